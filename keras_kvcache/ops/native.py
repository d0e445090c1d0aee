"""C++ of the package's own, compiled for the machine at hand when it's first needed."""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import jax
import jaxlib

from keras_kvcache.cache_folder import cache_folder

FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fPIC", "-shared")


def load_library(source):
    """The shared library made of a C++ file.

    It's compiled once and kept in the cache folder, one for each version of the file
    and of jaxlib and for each kind of processor.

    Args:
        source: Path of the file, which may include XLA's foreign function interface.

    Returns:
        A `ctypes.CDLL`, or `None` if this machine has no C++ compiler (`CXX`, `c++`,
        `g++` or `clang++`). `None`, too, with a warning, if the compiler fails or the
        library can't be kept or loaded.
    """
    compiler = find_compiler()
    if compiler is None:
        return None
    library = cache_folder() / "kernels" / f"{source.stem}-{_digest(source)}.so"
    try:
        if not library.exists():
            _compile(compiler, source, library)
        return ctypes.CDLL(str(library))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        warnings.warn(
            f"{source.name} could not be compiled for this machine, so that decoding "
            f"is slower: {reason.strip().splitlines()[-1]}",
            stacklevel=2,
        )
        return None


def find_compiler():
    """The command that runs a C++ compiler, or `None`; an empty `CXX` says none."""
    if "CXX" in os.environ:
        return shlex.split(os.environ["CXX"]) or None
    found = filter(None, map(shutil.which, ("c++", "g++", "clang++")))
    return next(([command] for command in found), None)


def _digest(source):
    """A name for what is compiled, from what and for which machine."""
    made_of = (source.read_text(), FLAGS, jaxlib.__version__, platform.machine())
    return hashlib.sha256(repr((*made_of, _features())).encode()).hexdigest()[:16]


def _features():
    """What `-march=native` looks at, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line[:5] in ("flags", "Featu")), "")


def _compile(compiler, source, library):
    """Makes a library; it's there whole or not at all."""
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        unfinished = Path(folder) / library.name
        command = [*compiler, *FLAGS, f"-I{jax.ffi.include_dir()}", str(source)]
        subprocess.run(
            [*command, "-o", str(unfinished)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=True,
        )
        os.replace(unfinished, library)
