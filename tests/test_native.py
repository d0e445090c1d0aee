"""Libraries that are compiled on first use, and what keeps one from being made."""

import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from keras_kvcache.runtime import native

pytestmark = [
    pytest.mark.jax_only,
    pytest.mark.skipif(
        native.find_compiler() is None, reason="libraries need a C++ compiler"
    ),
]

SOURCE = '#include "xla/ffi/api/c_api.h"\nextern "C" int Answer() { return %s; }\n'


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_KVCACHE_HOME", str(tmp_path / "home"))
    path = tmp_path / "answer.cc"
    path.write_text(SOURCE % 42)
    return path


def kept(tmp_path):
    return sorted(path.name for path in tmp_path.glob("home/kernels/*"))


def test_a_library_is_compiled_once(source, tmp_path, monkeypatch):
    assert native.load_library(source).Answer() == 42
    libraries = kept(tmp_path)
    assert len(libraries) == 1
    monkeypatch.setattr(native.subprocess, "run", None)  # which would fail if called
    assert native.load_library(source).Answer() == 42
    assert kept(tmp_path) == libraries


def test_a_changed_source_is_compiled_anew(source, tmp_path):
    native.load_library(source)
    source.write_text(SOURCE % 43)
    assert native.load_library(source).Answer() == 43
    assert len(kept(tmp_path)) == 2


def test_another_processor_has_a_library_of_its_own(source, tmp_path, monkeypatch):
    native.load_library(source)
    monkeypatch.setattr(native, "cpu_features", lambda: frozenset({"another"}))
    native.load_library(source)
    assert len(kept(tmp_path)) == 2


def cut(data, size):
    return data[:size]


def zeroed(data, size):
    return data[:size] + bytes(len(data) - size)


ANSWERS = """
import os, pathlib, sys
from keras_kvcache.runtime import native
for home in sys.argv[2:]:
    os.environ["KERAS_KVCACHE_HOME"] = home
    print(native.load_library(pathlib.Path(sys.argv[1])).Answer(), flush=True)
"""


def test_a_damaged_library_is_made_anew(source, tmp_path):
    native.load_library(source)
    (name,) = kept(tmp_path)
    whole = (tmp_path / "home" / "kernels" / name).read_bytes()
    libraries = []
    for damage in (cut, zeroed):
        for size in (0, 61, 1009, 8009):
            kernels = tmp_path / f"{damage.__name__}-{size}" / "kernels"
            kernels.mkdir(parents=True)
            libraries.append(kernels / name)
            libraries[-1].write_bytes(damage(whole, size))
    homes = [str(library.parent.parent) for library in libraries]
    # In a process of its own, as one that loads such a library is killed.
    run = subprocess.run(
        [sys.executable, "-c", ANSWERS, str(source), *homes],
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stdout) == (0, "42\n" * len(homes)), run.stderr
    for library in libraries:
        assert list(library.parent.iterdir()) == [library]
        assert library.read_bytes() == whole


def test_a_library_is_on_the_disk_before_its_name_is(source, tmp_path, monkeypatch):
    done, fsync, replace = [], native.os.fsync, native.os.replace
    kernels = tmp_path / "home" / "kernels"

    def write_out(descriptor):
        done.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def move(copy, library):
        done.append("move")
        replace(copy, library)

    monkeypatch.setattr(native.os, "fsync", write_out)
    monkeypatch.setattr(native.os, "replace", move)
    native.load_library(source)
    assert [Path(path).parent.parent for path in done[:1]] == [kernels]
    assert done[1:] == ["move", str(kernels)]


def test_a_new_jaxlib_and_other_flags_have_libraries_of_their_own(
    source, tmp_path, monkeypatch
):
    native.load_library(source)
    monkeypatch.setattr(native.jaxlib, "__version__", "7.11.13")
    native.load_library(source)
    monkeypatch.setattr(native, "FLAGS", ("-O1", "-fPIC", "-shared"))
    native.load_library(source)
    assert len(kept(tmp_path)) == 3


def test_a_compiler_that_fails_is_told_about(source, tmp_path):
    source.write_text(SOURCE % "nonsense")
    with pytest.warns(UserWarning, match="answer.cc .* slower: .*error.*nonsense"):
        assert native.load_library(source) is None
    assert kept(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_told_about(source, tmp_path):
    (tmp_path / "home").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="can't be kept.*Not a directory"):
        assert native.load_library(source).Answer() == 42


def test_a_folder_that_nothing_is_run_from_is_told_about(source, monkeypatch):
    def load(path):
        if "kernels" in path:
            raise OSError("failed to map segment from shared object")
        return ctypes_load(path)

    ctypes_load = native.ctypes.CDLL
    monkeypatch.setattr(native.ctypes, "CDLL", load)
    with pytest.warns(UserWarning, match="can't be kept.*failed to map"):
        assert native.load_library(source).Answer() == 42


def test_threads_that_make_it_at_once(source, tmp_path):
    with ThreadPoolExecutor(5) as threads:
        libraries = list(threads.map(native.load_library, [source] * 5))
    assert [library.Answer() for library in libraries] == [42] * 5
    assert len(kept(tmp_path)) == 1


def test_a_copy_that_fails_leaves_nothing(source, tmp_path, monkeypatch):
    def copy(made, to):
        raise OSError("No space left on device")

    monkeypatch.setattr(native.shutil, "copy", copy)
    with pytest.warns(UserWarning, match="can't be kept.*No space left"):
        assert native.load_library(source).Answer() == 42
    assert kept(tmp_path) == []


@pytest.mark.parametrize("command", ["no-such-compiler -O0", "'unbalanced", "false"])
def test_a_compiler_that_is_none(source, monkeypatch, command):
    monkeypatch.setenv("CXX", command)
    with pytest.warns(UserWarning, match="slower: .+"):
        assert native.load_library(source) is None


def test_an_empty_name_of_the_compiler_means_none(monkeypatch):
    monkeypatch.setenv("CXX", "")
    assert native.find_compiler() is None


def test_no_compiler_is_no_reason_to_complain(source, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native.load_library(source) is None
