"""The package's C++, compiled for this machine when it is first needed."""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
import time
import warnings
from pathlib import Path

import jax
import jaxlib

from keras_kvcache.runtime import atomic
from keras_kvcache.runtime.cache_folder import cache_folder, explain
from keras_kvcache.runtime.platform import cpu_features

FLAGS = "-std=c++17 -O3 -march=native -ffp-contract=fast -fPIC -shared -pthread".split()

_registration = threading.Lock()


def load_handler(name: str, source: Path, symbol: str) -> ctypes.CDLL | None:
    """Loads a library as `load_library` does, and lets programs call one function.

    Args:
        name: The name by which programs for the CPU call the function.
        source: As in `load_library`.
        symbol: The function's name in the file.

    Returns:
        A `ctypes.CDLL`, or `None`, the same in all calls of a process.
    """
    with _registration:
        return _register(name, source, symbol)


@functools.cache
def _register(name, source, symbol):
    library = load_library(source)
    if library is not None:
        handler = jax.ffi.pycapsule(getattr(library, symbol))
        jax.ffi.register_ffi_target(name, handler, platform="cpu")
    return library


def load_library(source: Path) -> ctypes.CDLL | None:
    """The shared library made of a C++ file.

    It's compiled once and kept in the cache folder, one for each version of the file
    and of jaxlib, for each compiler and each kind of processor.

    Args:
        source: Path of the file, which may include XLA's foreign function interface and
            headers beside it.

    Returns:
        A `ctypes.CDLL`, or `None` if this machine has no C++ compiler (`CXX`, `c++`,
        `g++` or `clang++`). `None`, too, with a warning, if the compiler fails or what
        it made can't be loaded. With a warning it's made for this process alone if it
        can't be kept.
    """
    try:
        compiler = find_compiler()
        return None if compiler is None else _load(compiler, source)
    except subprocess.CalledProcessError as error:
        reason = _first_error(error.stderr) or str(error)
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error)
    warnings.warn(
        f"{source.name} could not be made a library for this machine, so that decoding "
        f"is slower: {reason}",
        stacklevel=2,
    )
    return None


def find_compiler() -> list[str] | None:
    """The command that runs a C++ compiler, or `None`; an empty `CXX` says none."""
    if "CXX" in os.environ:
        return shlex.split(os.environ["CXX"]) or None
    found = filter(None, map(shutil.which, ("c++", "g++", "clang++")))
    return next(([command] for command in found), None)


def _load(compiler, source):
    files = [source, *sorted(source.parent.glob("*.h"))]
    text = [file.read_bytes() for file in files]
    made_of = (text, compiler, FLAGS, jaxlib.__version__, _processor())
    folder = cache_folder() / "kernels"
    name = f"{source.stem}-{_digest(repr(made_of).encode())}"
    for library in folder.glob(f"{name}-*.so"):
        # Loading a library that was cut short kills the process, so its name has the
        # digest of its bytes. A whole one may still be of another system.
        with contextlib.suppress(OSError):
            if library.name == f"{name}-{_digest(library.read_bytes())}.so":
                return ctypes.CDLL(str(library))
            library.unlink()
    # A process that is killed leaves nothing but in the system's temporary folder.
    with tempfile.TemporaryDirectory() as staging:
        made = Path(staging) / f"{name}.so"
        _compile(compiler, source, made)
        library = folder / f"{name}-{_digest(made.read_bytes())}.so"
        try:
            with atomic.writing(library) as staged:
                shutil.copy(made, staged)
            return ctypes.CDLL(str(library))
        except OSError as error:
            loaded = ctypes.CDLL(str(made))
            warnings.warn(
                f"The library made of {source.name} can't be kept, so that each "
                f"process takes the time to make its own: {explain(error) or error}",
                stacklevel=3,
            )
            return loaded


def _digest(data):
    return hashlib.sha256(data).hexdigest()[:16]


def _processor():
    """The processor, for which `-march=native` compiles, as far as the system tells."""
    kind = (platform.system(), platform.machine(), platform.processor())
    return (*kind, *sorted(cpu_features()))


def _compile(compiler, source, library):
    command = [*compiler, *FLAGS, f"-I{jax.ffi.include_dir()}", str(source)]
    begin = time.perf_counter()
    subprocess.run(
        [*command, "-o", str(library)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=True,
    )
    # For those who time what is compiled, as the command line does.
    seconds = time.perf_counter() - begin
    jax.monitoring.record_event_duration_secs("/keras_kvcache/compile/library", seconds)


def _first_error(output):
    """The line of a compiler's output that says what is wrong; empty if none is."""
    lines = output.splitlines()
    return next((line for line in lines if "error" in line), " ".join(lines[:1]))
