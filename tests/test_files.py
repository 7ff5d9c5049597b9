"""Files that appear whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from labsupport.model import files
from labsupport.model.files import WriteError


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_file_is_written_and_replaced(tmp_path):
    path = tmp_path / "a.txt"
    files.write_text(path, "première\n")
    assert path.read_bytes() == "première\n".encode()
    files.write_text(path, "second\n", sync=True)
    assert path.read_text() == "second\n"
    assert names(tmp_path) == {"a.txt"}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("something else"), ValueError("not this one")])
def test_what_is_raised_while_writing_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write(temporary: Path) -> None:
        temporary.write_text("half", encoding="utf-8")
        assert path.read_text() == "old"
        raise error

    with pytest.raises(type(error)) as raised:
        files.replace(path, write)
    assert raised.value is error
    assert path.read_text() == "old"
    assert names(tmp_path) == {"a.txt"}


def test_of_several_files_none_is_replaced_before_all_are_written(tmp_path):
    paths = [tmp_path / name for name in ("a", "b")]
    for path in paths:
        path.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half", encoding="utf-8")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        files.replace_all({paths[0]: lambda temporary: temporary.write_text("new"), paths[1]: fail})
    assert [path.read_text() for path in paths] == ["old", "old"]
    assert names(tmp_path) == {"a", "b"}
    files.replace_all({path: lambda temporary, path=path: temporary.write_text(path.name) for path in paths})
    assert [path.read_text() for path in paths] == ["a", "b"]


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    """The second begins and ends while the first is at work. Both files are whole, the last to finish stays."""
    path = tmp_path / "a"

    def write(temporary: Path) -> None:
        temporary.write_text("first, ", encoding="utf-8")
        files.write_text(path, "second")
        temporary.write_text(temporary.read_text(encoding="utf-8") + "all of it", encoding="utf-8")

    files.replace(path, write)
    assert path.read_text() == "first, all of it"
    assert names(tmp_path) == {"a"}


KILLED = """
import os, signal, sys
from pathlib import Path
from labsupport.model import files

def write(temporary):
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)

files.replace(Path(sys.argv[1]), write)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_a_killed_process_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_text("old")
    assert subprocess.run([sys.executable, "-c", KILLED, str(path)]).returncode < 0
    assert path.read_text() == "old"
    assert [left.suffix for left in tmp_path.iterdir() if left != path] == [files.SUFFIX]


@pytest.mark.parametrize(
    ("raised", "message", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full: a.txt could not be written", True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk is full: a.txt could not be written", True),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "the disk is full: a.txt could not be written", True),
        (OSError(errno.EROFS, "Read-only file system", "a.txt.tmp"), "a.txt cannot be written: Read-only file system", False),
        (SafetensorError("invalid header"), "a.txt cannot be written: invalid header", False),
        (OSError("made up"), "a.txt cannot be written: made up", False),
    ],
)
def test_a_file_that_cannot_be_written_is_one_line_with_its_name(tmp_path, raised, message, full):
    def write(temporary: Path) -> None:
        temporary.write_text("half", encoding="utf-8")
        raise raised

    with pytest.raises(WriteError) as caught:
        files.replace(tmp_path / "a.txt", write)
    assert str(caught.value).endswith(message)
    assert caught.value.disk_full == full
    assert caught.value.__cause__ is raised
    assert not names(tmp_path)


def test_where_no_file_can_be_written(tmp_path):
    (tmp_path / "file").write_text("mine")
    for write in (lambda path: files.write_text(path, "x"), files.check_writable):
        with pytest.raises(WriteError, match=r"file/a cannot be written: (Not a directory|File exists)"):
            write(tmp_path / "file" / "a")
    files.check_writable(tmp_path / "folder" / "a")
    assert names(tmp_path) == {"file", "folder"}
    assert not names(tmp_path / "folder")


def test_tensors_are_kept_with_their_metadata_and_others_may_read_them(tmp_path):
    tensors = {"a": torch.arange(12).view(3, 4).t(), "b": torch.ones(2)}
    path = tmp_path / "a.safetensors"
    files.save_tensors(path, tensors, {"step": "3"}, sync=True)
    found = load_file(path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert b'"step":"3"' in path.read_bytes()
    if sys.platform != "win32":
        assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_a_directory_whose_replacement_fails_between_two_names_is_there_again(tmp_path, monkeypatch):
    path, real, moved = tmp_path / "model", os.replace, []
    path.mkdir()
    (path / "old").write_text("old")

    def stop_at_the_second(source, target):
        moved.append(source)
        if len(moved) == 2:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt), files.replaced_directory(path):
        pass
    assert names(path) == {"old"}
    assert names(tmp_path) == {"model"}


@pytest.mark.parametrize("before", [True, False])
def test_a_directory_appears_when_it_is_complete(tmp_path, before):
    path = tmp_path / "deep" / "model"
    if before:
        path.mkdir(parents=True)
        (path / "old").write_text("old")

    def stopped() -> None:
        with files.replaced_directory(path) as new:
            (new / "half").write_text("half")
            assert path.exists() == before
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert not before or names(path) == {"old"}
    with files.replaced_directory(path) as new:
        (new / "whole").write_text("whole")
    assert names(path) == {"whole"}
    assert names(path.parent) == {"model"}
    if sys.platform != "win32":
        umask = os.umask(0)
        os.umask(umask)
        assert stat.S_IMODE(path.stat().st_mode) == 0o777 & ~umask
