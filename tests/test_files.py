"""Output directories: complete or absent, also where they cannot be swapped for another."""

import os

import pytest
from safetensors import SafetensorError

from pkt_fast import _files
from pkt_fast._files import atomic_directory, check_output_dir
from pkt_fast.errors import OutputError


def write(path, *, overwrite=False, name="new"):
    with atomic_directory(path, overwrite=overwrite) as temporary:
        (temporary / name).write_text("x", encoding="utf-8")


def test_an_empty_name_is_not_the_working_directory():
    with pytest.raises(OutputError, match="empty name"):
        check_output_dir("", overwrite=True)


def test_the_working_directory_keeps_its_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = os.stat(".").st_ino
    write(".")
    assert os.listdir(".") == ["new"]
    assert os.stat(tmp_path).st_ino == before


@pytest.mark.parametrize("path", [".", "..", "link"])
def test_overwriting_never_empties_the_working_directory_or_one_above(tmp_path, monkeypatch, path):
    work = tmp_path / "work"
    work.mkdir()
    (work / "mine").touch()
    (work / "link").symlink_to(tmp_path)
    monkeypatch.chdir(work)
    with pytest.raises(OutputError, match="working directory"):
        write(path, overwrite=True)
    assert sorted(os.listdir(work)) == ["link", "mine"]
    assert os.listdir(tmp_path) == ["work"]


def test_a_deleted_working_directory_does_not_hinder_another_path(tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    write(tmp_path / "out")
    write(tmp_path / "out", overwrite=True, name="newer")
    assert os.listdir(tmp_path / "out") == ["newer"]


def test_a_mount_point_is_filled_in_place(tmp_path, monkeypatch):
    target = tmp_path / "mounted"
    (target / "old").mkdir(parents=True)
    (target / "file").touch()
    (target / "dangling").symlink_to("nowhere")
    monkeypatch.setattr(os.path, "ismount", lambda path: os.fspath(path) == str(target))
    write(target, overwrite=True)
    assert os.listdir(target) == ["new"]
    assert os.listdir(tmp_path) == ["mounted"]


@pytest.mark.parametrize("mounted", [False, True])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O")])
def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch, error, mounted):
    target = tmp_path / "out"
    write(target, name="old")
    monkeypatch.setattr(_files, "_stays", lambda path: mounted)
    with (
        pytest.raises(OutputError, match="cannot write"),
        atomic_directory(target, overwrite=True),
    ):
        raise error
    assert os.listdir(target) == ["old"]
    assert os.listdir(tmp_path) == ["out"]


def test_a_symlink_to_a_directory_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert os.listdir(tmp_path / "real") == ["new"]
