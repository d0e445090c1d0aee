"""All that only a machine with an accelerator can tell, in at most eight minutes.

    python benchmarks/on_accelerator.py --wheels wheels --output results

needs no network: only JAX with its plugin, this checkout, and the wheels that
`carry_wheels.py` downloaded. It installs missing ones into a folder of its own. Each
part runs in its own processes, the most telling part first. If one fails, that is
printed and the next begins; one that hangs is killed when its time is up.
`on_accelerator.jsonl` gets each row at once, with the device's name, and one row with
the outcome of each part; `on_accelerator.log` gets what the parts print. The status is
0 if no part failed.

`--quick` runs everything in small sizes, also on a CPU. If parts are named, only these
run.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SECONDS = 8 * 60  # for all parts together
LEAST = 10  # seconds that are worth beginning with
LINES_SHOWN = 25  # of what a part that failed printed


class Part(NamedTuple):
    """A script that writes rows as `harness.Report` does, and how long it may take."""

    name: str
    command: tuple[str, ...]
    seconds: float


def script(name, seconds, *arguments):
    file = arguments[0] if arguments else name
    return Part(name, (str(HERE / f"{file}.py"), *arguments[1:]), seconds)


PARTS = (
    script("machine", 60),
    script("kernel_tests", 120, "run_tests", "kernel"),
    script("parity", 120),
    script("attention_kernels", 100),
    script("attention_step", 100),
    script("memory_limit", 120),
    script("generation", 150),
    script("program_tests", 120, "run_tests", "programs"),
)


def main():
    parser = argparse.ArgumentParser(description="Runs all parts on an accelerator.")
    parser.add_argument("parts", nargs="*", help="which; all if none is named")
    parser.add_argument("--wheels", type=Path, help="what carry_wheels.py made")
    parser.add_argument("--output", type=Path, required=True, help="folder of results")
    parser.add_argument("--quick", action="store_true", help="small sizes")
    options = parser.parse_args()
    names = [part.name for part in PARTS]
    if unknown := set(options.parts) - set(names):
        parser.error(f"`parts` must be of {names}. Received: {sorted(unknown)}")
    parts = [part for part in PARTS if part.name in (options.parts or names)]
    # A killed script still ends what it began.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside"))
    with tempfile.TemporaryDirectory() as scratch:
        end = time.monotonic() + SECONDS
        site = Path(scratch) / "site"
        if options.wheels:
            install(options.wheels, site)
        runner = Runner(options.output, Path(scratch), environment(site))
        for part in parts:
            quick = ["--quick"] if options.quick else []
            runner.run(part, quick, end - time.monotonic())
    runner.print_summary()
    sys.exit(0 if runner.is_good else 1)


def environment(site):
    """For all parts: this checkout, then installed wheels, then what was there."""
    paths = [str(ROOT), str(site), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "KERAS_BACKEND": "jax",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
    }


def install(wheels, site):
    """Installs wheels whose package is missing, or here in a version that won't do."""
    files = sorted(wheels.glob("*.whl"))
    if not files:
        raise SystemExit(f"`--wheels` must be a folder with wheels. Received: {wheels}")
    missing = [str(file) for file in files if not is_here(file.name.split("-")[0])]
    print(f"{len(missing)} of {len(files)} wheels are installed", flush=True)
    if missing:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index"]
        command += ["--no-deps", "--no-compile", "--no-cache-dir", f"--target={site}"]
        subprocess.run([*command, *missing], check=True)


def is_here(name):
    """Whether this Python has the package as this project asks for it."""
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    try:
        from packaging.requirements import Requirement
    except ImportError:  # pip has a copy.
        from pip._vendor.packaging.requirements import Requirement
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    project = tomllib.loads(text)["project"]
    asked = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    requirements = [each for each in map(Requirement, asked) if not each.extras]
    return all(
        each.specifier.contains(version, prereleases=True)
        for each in requirements
        if each.name.replace("-", "_") == name.replace("-", "_")
    )


class Runner:
    """Runs parts one by one and keeps their rows.

    Args:
        output: Folder of `on_accelerator.jsonl` and `on_accelerator.log`.
        scratch: Folder for the parts' own files.
        environment: Dictionary of environment variables.
    """

    def __init__(self, output, scratch, environment):
        output.mkdir(parents=True, exist_ok=True)
        self._scratch, self._environment = scratch, environment
        self._rows_path = output / "on_accelerator.jsonl"
        self._log_path = output / "on_accelerator.log"
        self._rows_path.write_text("")
        self._log_path.write_text("")
        self._device, self._outcomes = None, []

    @property
    def is_good(self):
        """Whether something ran, and nothing failed."""
        outcomes = {outcome["status"] for outcome in self._outcomes}
        return "passed" in outcomes and outcomes <= {"passed", "skipped"}

    def run(self, part, arguments, seconds_left):
        """Runs a part for at most its own time and the time left for all."""
        seconds = min(part.seconds, seconds_left)
        begin, written = time.monotonic(), self._log_path.stat().st_size
        if seconds < LEAST and seconds < part.seconds:
            self._end(part, "no time left", 0, rows=0)
            return
        print(f"== {part.name}, at most {seconds:.0f} s", flush=True)
        folder = self._scratch / part.name
        folder.mkdir()
        rows = _Rows(folder)
        with open(self._log_path, "ab") as log:
            log.write(f"\n== {part.name}\n".encode())
            log.flush()
            process = subprocess.Popen(
                [sys.executable, *part.command, "--output", str(folder), *arguments],
                cwd=ROOT,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                while (code := process.poll()) is None:
                    if time.monotonic() > begin + seconds:
                        break
                    self._keep(part, rows.read())
                    time.sleep(0.2)
            finally:
                # With its child processes, which may outlive it.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self._keep(part, rows.read())
        if code is None:
            status = "timed out"
        elif code or not rows.count:
            status = "failed"
        else:
            status = "skipped" if rows.are_skipped else "passed"
        said = {} if status == "passed" else {"exit": code}
        self._end(part, status, time.monotonic() - begin, rows=rows.count, **said)
        if status in ("failed", "timed out"):
            with open(self._log_path, "rb") as log:
                log.seek(written)
                lines = log.read().decode(errors="replace").splitlines()
            print("\n".join(lines[-LINES_SHOWN:]), flush=True)

    def print_summary(self):
        """A line a part."""
        print(f"\n{self._device or 'no device'}; rows in {self._rows_path}\n")
        for outcome in self._outcomes:
            print(
                f"{outcome['part']:<20}{outcome['status']:<14}"
                f"{outcome['seconds']:>6.1f} s{outcome['rows']:>6} rows"
            )

    def _end(self, part, status, seconds, **more):
        outcome = {"part": part.name, "status": status, "seconds": seconds, **more}
        self._outcomes.append(outcome)
        self._write([outcome])
        print(f"   {status} after {seconds:.1f} s", flush=True)

    def _keep(self, part, rows):
        kept = []
        for row in rows:
            if "benchmark" in row:  # the context that a file begins with
                self._device = row["machine"]
            else:
                kept.append({"part": part.name, **row})
        self._write(kept)

    def _write(self, rows):
        with open(self._rows_path, "a", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps({"device": self._device, **row}) + "\n")
            file.flush()
            os.fsync(file.fileno())


class _Rows:
    """The rows in a folder's files, each read once, when its line is whole.

    Attributes:
        count: How many were read, contexts left out.
        are_skipped: Whether all of them say why something was left out.
    """

    def __init__(self, folder):
        self._folder, self._read = folder, {}
        self.count, self.are_skipped = 0, True

    def read(self):
        """Rows that came since the last call."""
        for path in sorted(self._folder.glob("*.jsonl")):
            lines = path.read_bytes().split(b"\n")[:-1]
            for line in lines[self._read.get(path, 0) :]:
                row = json.loads(line)
                if "benchmark" not in row:
                    self.count += 1
                    self.are_skipped &= "skipped" in row
                yield row
            self._read[path] = len(lines)


if __name__ == "__main__":
    main()
