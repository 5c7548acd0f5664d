"""What replaces a file or a folder is there as a whole, and on disk before it has its name."""

import os
import re

import pytest

from modeling_lrsclip.files import atomic


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_error_leaves_the_file_as_it_was(tmp_path):
    atomic.replace_text(tmp_path / "a.txt", "first")
    with pytest.raises(OSError, match="full"), atomic.replacing(tmp_path / "a.txt") as growing:
        growing.write_text("half")
        raise OSError("full")
    assert (tmp_path / "a.txt").read_text() == "first" and names(tmp_path) == ["a.txt"]
    atomic.replace_json(tmp_path / "a.txt", {"é": [1, 2.5], "b": ["x"]})
    assert (tmp_path / "a.txt").read_bytes() == '{\n  "é": [1, 2.5],\n  "b": [\n    "x"\n  ]\n}\n'.encode()
    assert names(tmp_path) == ["a.txt"]


def test_content_is_on_disk_before_its_name(tmp_path, monkeypatch):
    """The order of flushes and renames, as the operating system is asked for them."""
    calls = []
    sync, replace, rename = atomic.sync, os.replace, atomic.Path.rename
    monkeypatch.setattr(atomic, "sync", lambda path: (calls.append(("sync", path.name)), sync(path)))
    monkeypatch.setattr(atomic.os, "replace", lambda old, new: (calls.append(("rename", new.name)), replace(old, new)))
    monkeypatch.setattr(atomic.Path, "rename", lambda old, new: (calls.append(("rename", new.name)), rename(old, new)))
    folder = tmp_path / "folder"
    atomic.replace_text(tmp_path / "a", "x")
    assert calls[0][0] == "sync" and re.fullmatch(r"\.a\..{12}\.partial", calls[0][1])
    assert calls[1:] == [("rename", "a"), ("sync", tmp_path.name)]
    calls.clear()
    growing = atomic.growing_folder(folder)
    (growing / "below").mkdir(parents=True)
    (growing / "below" / "weights").write_text("x")
    atomic.publish_folder(growing, folder)
    assert sorted(calls[:3]) == [("sync", ".folder.partial"), ("sync", "below"), ("sync", "weights")]
    assert calls[3:] == [("rename", "folder"), ("sync", tmp_path.name)] and names(tmp_path) == ["a", "folder"]


def test_files_and_folders_are_flushed_and_closed(tmp_path, monkeypatch):
    flushed, open_before = [], len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(atomic.os, "fsync", lambda descriptor: flushed.append(os.fstat(descriptor).st_ino))
    (tmp_path / "a").touch()
    for path in (tmp_path, tmp_path / "a"):
        atomic.sync(path)
    assert flushed == [path.stat().st_ino for path in (tmp_path, tmp_path / "a")]
    assert len(os.listdir("/proc/self/fd")) == open_before


def test_a_folder_is_made_with_those_above_it(tmp_path):
    for _ in range(2):
        assert atomic.make_folder(str(tmp_path / "a" / "b")) == tmp_path / "a" / "b"
        assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file/c cannot be written to \(Not a directory\); give another folder."):
        atomic.make_folder(tmp_path / "file" / "c")


def test_json_without_nan_where_it_is_asked_for(tmp_path):
    atomic.replace_json(tmp_path / "a.json", [float("nan")])
    with pytest.raises(ValueError, match="not JSON compliant"):
        atomic.replace_json(tmp_path / "a.json", [float("inf")], allow_nan=False)
    assert "NaN" in (tmp_path / "a.json").read_text()


def folder_of(path, text: str):
    path.mkdir()
    (path / "weights").write_text(text)
    return path


def test_a_folder_is_replaced_and_its_former_content_goes(tmp_path):
    folder = folder_of(tmp_path / "best", "first")
    atomic.publish_folder(folder_of(tmp_path / ".best.partial", "second"), folder)
    assert (folder / "weights").read_text() == "second" and names(tmp_path) == ["best"]
    folder_of(tmp_path / ".best.old", "left by a crash after both renames")
    atomic.publish_folder(folder_of(tmp_path / ".best.partial", "third"), folder)
    assert (folder / "weights").read_text() == "third" and names(tmp_path) == ["best"]


def test_between_the_renames(tmp_path, monkeypatch):
    """An error brings the former folder back at once; after a crash, the next call does."""
    folder, growing = folder_of(tmp_path / "best", "first"), folder_of(tmp_path / ".best.partial", "second")
    rename = atomic.Path.rename

    def failing(path, target):
        if path == growing:
            raise OSError("no")
        return rename(path, target)

    monkeypatch.setattr(atomic.Path, "rename", failing)
    with pytest.raises(OSError, match="no"):
        atomic.publish_folder(growing, folder)
    assert (folder / "weights").read_text() == "first" and growing.exists()
    monkeypatch.undo()
    folder.rename(tmp_path / ".best.old")  # a crash between the two
    atomic.restore_folder(folder)
    assert (folder / "weights").read_text() == "first" and not (tmp_path / ".best.old").exists()
    folder.rename(tmp_path / ".best.old")
    atomic.publish_folder(growing, folder)
    assert (folder / "weights").read_text() == "second" and names(tmp_path) == ["best"]
