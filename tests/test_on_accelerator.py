"""The script for accelerators: its runner's limits and rows, its wheels, its parts."""

import importlib
import json
import os
import time
import zipfile
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

# What every script of a part begins with: its rows go to a file as it makes them.
BEGIN = """
import json, os, sys, time
path = os.path.join(sys.argv[sys.argv.index("--output") + 1], "rows.jsonl")
def add(**row):
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\\n")
add(benchmark="it", machine="Abacus 7")
"""


@pytest.fixture
def script(monkeypatch):
    """The module `on_accelerator`, or another of the benchmarks by its name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def run(script, tmp_path):
    """Runs parts given as code and seconds: the runner, and the rows it wrote."""
    module = script("on_accelerator")
    scratch, output = tmp_path / "scratch", tmp_path / "output"
    scratch.mkdir()
    runner = module.Runner(output, scratch, dict(os.environ))

    def run_parts(*parts, seconds_left=60):
        for number, (code, seconds) in enumerate(parts):
            file = scratch / f"{number}.py"
            file.write_text(BEGIN + code)
            part = module.Part(f"part{number}", (str(file),), seconds)
            runner.run(part, [], seconds_left)
        text = (output / "on_accelerator.jsonl").read_text()
        return runner, [json.loads(line) for line in text.splitlines()]

    run_parts.output = output
    return run_parts


def outcomes(rows):
    return {row["part"]: row["status"] for row in rows if "status" in row}


def test_what_fails_or_hangs_loses_only_itself(run, capsys):
    runner, rows = run(
        ("add(n=2)", 30),
        ("add(n=3); raise SystemExit('out of order')", 30),
        ("add(n=5); time.sleep(600); add(n=6)", 2),
        ("", 30),
        ("add(n=7)", 30),
    )
    assert [row["n"] for row in rows if "n" in row] == [2, 3, 5, 7]
    assert {row["device"] for row in rows} == {"Abacus 7"}
    assert list(outcomes(rows).values()) == [
        "passed",
        "failed",
        "timed out",
        "failed",  # as it said nothing
        "passed",
    ]
    assert not runner.is_good
    runner.print_summary()
    shown = capsys.readouterr().out
    assert "out of order" in shown
    assert "part2               timed out" in shown
    assert "out of order" in (run.output / "on_accelerator.log").read_text()


def test_rows_are_there_before_their_part_ends(run):
    """It looks for its own row, and says when it finds it."""
    rows_path = run.output / "on_accelerator.jsonl"
    code = f"""
add(n=11)
while '"n": 11' not in open({str(rows_path)!r}).read():
    time.sleep(0.05)
add(n=13)
"""
    runner, rows = run((code, 20))
    assert [row["n"] for row in rows if "n" in row] == [11, 13]
    assert runner.is_good


def test_what_hangs_takes_its_own_processes_along(run, tmp_path):
    beat = tmp_path / "beat"
    child = (
        f"import time\nwhile True: open({str(beat)!r}, 'a').write('.'); time.sleep(0.1)"
    )
    code = f"""
import subprocess
subprocess.Popen([sys.executable, "-c", {child!r}])
add(n=17)
time.sleep(600)
"""
    run((code, 3))
    assert beat.stat().st_size > 0
    time.sleep(0.3)
    before = beat.stat().st_size
    time.sleep(0.5)
    assert beat.stat().st_size == before


def test_time_that_is_over_begins_nothing(run):
    runner, rows = run(("add(n=19)", 30), seconds_left=1)
    assert outcomes(rows) == {"part0": "no time left"}
    assert not runner.is_good


def test_only_skipping_is_no_success(run):
    skip = ("add(skipped='no module torch')", 30)
    runner, rows = run(skip)
    assert outcomes(rows) == {"part0": "skipped"}
    assert not runner.is_good


def test_skipping_is_no_failure(run):
    runner, rows = run(("add(skipped='no module torch')", 30), ("add(n=23)", 30))
    assert list(outcomes(rows).values()) == ["skipped", "passed"]
    assert runner.is_good


def test_parts_are_scripts_that_are_there(script):
    parts = script("on_accelerator").PARTS
    assert all(Path(part.command[0]).exists() for part in parts)
    assert len({part.name for part in parts}) == len(parts)


def test_what_is_here_as_asked_for_is_not_installed(script, monkeypatch):
    module = script("on_accelerator")
    assert module.is_here("keras") and module.is_here("pytest")
    assert not module.is_here("a_package_that_nobody_has")
    monkeypatch.setattr(module.importlib.metadata, "version", lambda name: "2.9")
    assert not module.is_here("keras")  # of which the project needs a later one
    assert module.is_here("namex")


def test_wheels_that_are_too_large_are_listed(script, tmp_path):
    module = script("carry_wheels")
    for name, size in (
        ("small-1-py3-none-any.whl", 7),
        ("large-1-py3-none-any.whl", 61),
    ):
        with open(tmp_path / name, "wb") as file:
            file.truncate(size * 10**6 if size > 7 else size)
    with pytest.raises(SystemExit, match=r"at most 60 MB.*\n +61.0 MB  large-1"):
        module.check_size(tmp_path)


def test_what_wheels_need_is_read_for_another_python(script, tmp_path):
    module = script("carry_wheels")
    wheel = tmp_path / "thing-1-py3-none-any.whl"
    metadata = """Metadata-Version: 2.1
Requires-Dist: Always_There >=2
Requires-Dist: old ; python_version < "3.12"
Requires-Dist: new ; python_version >= "3.12"
Requires-Dist: extra ; extra == "more"
Requires-Dist: elsewhere ; sys_platform == "win32"
"""
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("thing-1.dist-info/METADATA", metadata)
    needed = {
        python: [r.name for r in module.needs(wheel, python)]
        for python in ("3.11", "3.12")
    }
    assert needed == {"3.11": ["Always_There", "old"], "3.12": ["Always_There", "new"]}
    wanted = {module.name_of(each) for each in module.project_requirements()}
    assert {"keras", "keras-hub", "gguf", "pytest"} <= wanted
