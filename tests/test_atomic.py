"""Files that appear whole or not at all."""

import os

import pytest

from keras_kvcache.runtime import atomic


def write(path, text):
    with atomic.writing(path) as staged:
        staged.write_text(text)


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_a_file_is_written_with_its_folder(tmp_path):
    write(tmp_path / "new" / "file.txt", "seven")
    assert contents(tmp_path / "new") == {"file.txt": "seven"}


def test_an_earlier_file_stays_until_the_new_one_is_whole(tmp_path):
    write(tmp_path / "file.txt", "old")
    with atomic.writing(tmp_path / "file.txt") as staged:
        staged.write_text("new")
        assert (tmp_path / "file.txt").read_text() == "old"
    assert contents(tmp_path) == {"file.txt": "new"}


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_an_error_leaves_the_earlier_file_alone(tmp_path, monkeypatch, name):
    write(tmp_path / "file.txt", "old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, name, fail)
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path / "file.txt", "new")
    assert contents(tmp_path) == {"file.txt": "old"}


def test_an_error_of_the_writer_leaves_the_earlier_file_alone(tmp_path):
    write(tmp_path / "file.txt", "old")
    with pytest.raises(RuntimeError), atomic.writing(tmp_path / "file.txt") as staged:
        staged.write_text("ne")
        raise RuntimeError
    assert contents(tmp_path) == {"file.txt": "old"}


def test_permissions_are_those_of_other_new_files(tmp_path):
    write(tmp_path / "ours", "")
    (tmp_path / "other").write_text("")
    modes = {(tmp_path / name).stat().st_mode for name in ("ours", "other")}
    assert len(modes) == 1


def test_bytes_are_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace

    def note_fsync(descriptor):
        done.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def note_replace(source, target):
        done.append("replace")
        replace(source, target)

    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "file").write_text("five")
    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    atomic.replace(folder, tmp_path / "target")
    assert done == [str(folder), str(folder / "file"), "replace", str(tmp_path)]
