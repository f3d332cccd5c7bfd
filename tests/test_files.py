"""Files are written whole or not at all."""

import os
from pathlib import Path

import pytest
from tiny import files

from mrcnf import files as writing
from mrcnf.errors import UserError


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch, function, error):
    path = tmp_path / "file"
    writing.write(path, "old")

    def fail(*args):
        raise error

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(UserError if isinstance(error, OSError) else KeyboardInterrupt):
        writing.write(path, "new")
    assert files(tmp_path) == {path.relative_to(tmp_path): b"old"}


def test_a_folder_below_a_file_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    path = tmp_path / "file" / "run" / "a"
    with pytest.raises(UserError, match="choose another place") as error:
        writing.write(path, "new")
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_folder_is_no_file(tmp_path):
    for path in (tmp_path, Path(".")):
        with pytest.raises(UserError, match="is a folder; name a file"):
            writing.write(path, "x")


def test_files_are_written_all_or_none(tmp_path):
    (tmp_path / "a").write_text("old")
    (tmp_path / "c").mkdir()
    writing.write_all(tmp_path, [("a", b"1"), ("b", b"2")])
    assert files(tmp_path) == {Path("a"): b"1", Path("b"): b"2"}
    with pytest.raises(UserError, match="c is a folder"):
        writing.write_all(tmp_path, [("a", b"3"), ("c", b"4")])

    def broken():
        yield "a", b"3"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        writing.write_all(tmp_path / "new" / "folder", broken())
    assert files(tmp_path) == {Path("a"): b"1", Path("b"): b"2"}
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "c"}
