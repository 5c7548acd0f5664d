"""A file or a folder is on disk before it has its name, and gets its name by a rename."""

import os

import pytest

from modeling_lrsclip.files import atomic
from modeling_lrsclip.files.atomic import growing_folder, publish_folder, replace_bytes, replacing, restore_folder


@pytest.fixture
def calls(monkeypatch):
    """What is asked of the disk, in order: `("sync", path)` and `("rename", source, target)`."""
    recorded = []
    rename, replace, sync = os.rename, os.replace, atomic.sync

    def note(kind, function):
        def noted(*paths, **options):
            recorded.append((kind, *(os.fspath(path) for path in paths[:2])))
            return function(*paths, **options)

        return noted

    monkeypatch.setattr(os, "rename", note("rename", rename))
    monkeypatch.setattr(os, "replace", note("rename", replace))
    monkeypatch.setattr(atomic, "sync", note("sync", sync))
    return recorded


def test_a_file_is_flushed_before_it_has_its_name_and_its_folder_after(calls, tmp_path):
    replace_bytes(tmp_path / "file", b"new")
    kinds = [call[0] for call in calls]
    assert kinds == ["sync", "rename", "sync"]
    growing, folder = calls[0][1], calls[2][1]
    assert calls[1] == ("rename", growing, str(tmp_path / "file")) and folder == str(tmp_path)


def test_sync_reaches_the_disk(monkeypatch, tmp_path):
    flushed = []
    monkeypatch.setattr(os, "fsync", flushed.append)
    (tmp_path / "file").write_bytes(b"x")
    atomic.sync(tmp_path / "file")
    atomic.sync(tmp_path)
    assert len(flushed) == 2


def test_a_folder_is_flushed_with_all_its_files_and_renamed(calls, tmp_path):
    folder = tmp_path / "final"
    growing = growing_folder(folder)
    (growing / "inner").mkdir(parents=True)
    (growing / "inner" / "weights").write_bytes(b"1")
    inode = (growing / "inner" / "weights").stat().st_ino
    publish_folder(growing, folder)
    assert (folder / "inner" / "weights").stat().st_ino == inode and not growing.exists()  # no copy
    at = calls.index(("rename", str(growing), str(folder)))
    before, after = calls[:at], calls[at + 1 :]
    assert {path for kind, path in before} == {
        str(growing),
        str(growing / "inner"),
        str(growing / "inner" / "weights"),
    }
    assert all(kind == "sync" for kind, _ in before) and after == [("sync", str(tmp_path))]


def test_the_former_folder_stays_until_the_new_one_is_in_place(monkeypatch, tmp_path):
    folder = tmp_path / "final"
    folder.mkdir()
    (folder / "weights").write_bytes(b"old")
    growing = growing_folder(folder)
    growing.mkdir()
    (growing / "weights").write_bytes(b"new")

    rename = os.rename

    def full_disk(source, target, **_):
        if os.fspath(source) == str(growing):
            raise OSError(28, "No space left on device")
        rename(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", full_disk)
        with pytest.raises(OSError, match="No space left"):
            publish_folder(growing, folder)
    assert (folder / "weights").read_bytes() == b"old"
    publish_folder(growing, folder)
    assert (folder / "weights").read_bytes() == b"new" and [path.name for path in tmp_path.iterdir()] == ["final"]


def test_a_crash_between_the_two_renames(tmp_path):
    folder = tmp_path / "final"
    (tmp_path / ".final.old").mkdir()
    restore_folder(folder)
    assert folder.is_dir() and not (tmp_path / ".final.old").exists()


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), replacing(path) as growing:
        growing.write_bytes(b"half")
        raise RuntimeError
    assert path.read_bytes() == b"old" and [entry.name for entry in tmp_path.iterdir()] == ["file"]
