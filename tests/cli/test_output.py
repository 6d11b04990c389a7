"""Files and folders appear whole or not at all; what is there is not lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantsim.cli.command import CommandError
from quantsim.cli.output import check_output, written_whole
from tests.cli.conftest import names_in


def test_a_file_and_a_folder_appear_when_the_block_ends(tmp_path: Path) -> None:
    with written_whole(tmp_path / "deep" / "file") as part:
        part.write_text("new")
        assert not (tmp_path / "deep" / "file").exists()
    with written_whole(tmp_path / "folder") as part:
        part.mkdir()
        (part / "a").touch()
    assert (tmp_path / "deep" / "file").read_text() == "new"
    assert names_in(tmp_path) == {"deep", "folder"}
    assert names_in(tmp_path / "deep") == {"file"}


def test_a_folder_takes_the_place_of_another(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "old").touch()
    with written_whole(tmp_path / "x") as part:
        part.mkdir()
        (part / "new").touch()
    assert names_in(tmp_path) == {"x"}
    assert names_in(tmp_path / "x") == {"new"}


def test_a_failure_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "old").touch()
    with pytest.raises(RuntimeError), written_whole(tmp_path / "x") as part:
        part.mkdir()
        (part / "half").touch()
        raise RuntimeError
    assert names_in(tmp_path) == {"x"}
    assert names_in(tmp_path / "x") == {"old"}


def test_the_old_folder_comes_back_where_the_new_one_was_never_written(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "old").touch()
    with pytest.raises(FileNotFoundError), written_whole(tmp_path / "x"):
        pass
    assert names_in(tmp_path) == {"x"}
    assert names_in(tmp_path / "x") == {"old"}


def test_places_that_are_free(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "new" / "folder", False, folder=True)
    check_output(tmp_path / "empty", False, folder=True)
    assert not (tmp_path / "new").exists()  # asked, not made


def test_places_that_are_taken(tmp_path: Path) -> None:
    folder, file = tmp_path / "folder", tmp_path / "file"
    folder.mkdir()
    (folder / "precious").touch()
    file.touch()
    for path, is_folder in ((folder, True), (file, False)):
        with pytest.raises(CommandError, match="exists already"):
            check_output(path, False, folder=is_folder)
    check_output(file, True, folder=False)
    with pytest.raises(CommandError, match="holds no checkpoint of quantsim"):
        check_output(folder, True, folder=True)
    with pytest.raises(CommandError, match="is a folder; expected the file"):
        check_output(folder, True, folder=False)
    with pytest.raises(CommandError, match="is no folder that can be written to"):
        check_output(file / "below", False, folder=True)


def test_a_checkpoint_may_be_replaced(checkpoint: Path) -> None:
    check_output(checkpoint, True, folder=True)
    with pytest.raises(CommandError, match="exists already"):
        check_output(checkpoint, False, folder=True)
