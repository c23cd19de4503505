"""Output directories: complete or absent, also where they cannot be swapped for another."""

import os

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from pkt_fast import _files
from pkt_fast._files import (
    INVENTORY,
    atomic_directory,
    atomic_file,
    check_output_dir,
    write_inventory,
)
from pkt_fast.errors import OutputError
from pkt_fast.stores import writing_directory_store


def write(path, *, overwrite=False, name="report.json"):
    with atomic_directory(path, overwrite=overwrite) as temporary:
        (temporary / name).write_text("x", encoding="utf-8")


def test_what_is_no_path_is_refused():
    with pytest.raises(OutputError, match="is 3; give a path"):
        check_output_dir(3, overwrite=True)


def test_an_empty_name_is_not_the_working_directory():
    with pytest.raises(OutputError, match="empty name"):
        check_output_dir("", overwrite=True)


def test_the_working_directory_keeps_its_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = os.stat(".").st_ino
    write(".")
    write(".", overwrite=True, name="report.html")
    assert os.listdir(".") == ["report.html"]
    assert os.stat(tmp_path).st_ino == before


def test_others_may_read_what_the_umask_lets_them(tmp_path):
    def modes(path):
        return {oct(entry.stat().st_mode & 0o777) for entry in (path, *path.rglob("*"))}

    before = os.umask(0o027)
    try:
        with atomic_directory(tmp_path / "out") as temporary:
            (temporary / "sub").mkdir()
            save_file({"a": torch.zeros(1)}, temporary / "sub" / "a.safetensors")
        with writing_directory_store(
            tmp_path / "store", [1], [0], {"a": (2, torch.float32)}, {}
        ) as store:
            store.append({"a": torch.zeros(1, 2)})
        with atomic_file(tmp_path / "basis") as temporary:
            save_file({"a": torch.zeros(1)}, temporary)
    finally:
        os.umask(before)
    assert modes(tmp_path / "out") == modes(tmp_path / "store") == {"0o750", "0o640"}
    assert modes(tmp_path / "basis") == {"0o640"}


@pytest.mark.parametrize("path", [".", "..", "link", "other"])
def test_overwriting_removes_nothing_that_pkt_fast_did_not_write(tmp_path, monkeypatch, path):
    work = tmp_path / "work"
    (work / "other" / "report.json").mkdir(parents=True)  # a folder of that name is not ours
    (work / "mine").touch()
    (work / "link").symlink_to(tmp_path)
    monkeypatch.chdir(work)
    with pytest.raises(OutputError, match="did not write"):
        write(path, overwrite=True)
    assert sorted(os.listdir(work)) == ["link", "mine", "other"]
    assert os.listdir(tmp_path) == ["work"]


def test_a_refusal_names_a_few_files(tmp_path):
    for name in ("a", "b", "c", "d", "e", "report.json"):
        (tmp_path / name).touch()
    with pytest.raises(OutputError, match=r"\(a, b, c and 2 more\)"):
        check_output_dir(tmp_path, overwrite=True)


def test_what_an_inventory_lists_may_be_overwritten(tmp_path):
    def write_model():
        with atomic_directory(tmp_path / "out", overwrite=True) as temporary:
            (temporary / "templates").mkdir()
            (temporary / "templates" / "chat").touch()
            (temporary / "model.safetensors").touch()
            write_inventory(temporary)

    write_model()
    write_model()
    assert sorted(os.listdir(tmp_path / "out")) == ["model.safetensors", INVENTORY, "templates"]
    (tmp_path / "out" / "note").touch()
    with pytest.raises(OutputError, match=r"\(note\)"):
        write_model()
    for nonsense in ("{", "{}", "[1, []]"):
        (tmp_path / "out" / INVENTORY).write_text(nonsense)
        with pytest.raises(OutputError, match=r"model\.safetensors"):
            write_model()


@pytest.mark.parametrize("name", ["~/out", "~nobody-has-this-name/out"])
def test_a_tilde_is_the_home_directory(tmp_path, monkeypatch, name):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    write(name)
    expected = "home" if name.startswith("~/") else name.partition("/")[0]
    assert os.listdir(tmp_path) == [expected]
    assert os.listdir(tmp_path / expected / "out") == ["report.json"]


def test_a_deleted_working_directory_does_not_hinder_another_path(tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    write(tmp_path / "out")
    write(tmp_path / "out", overwrite=True, name="report.html")
    assert os.listdir(tmp_path / "out") == ["report.html"]


def test_a_mount_point_is_filled_in_place(tmp_path, monkeypatch):
    target = tmp_path / "mounted"
    (target / "folder").mkdir(parents=True)
    (target / "file").touch()
    write_inventory(target)
    (target / "report.html").symlink_to("nowhere")
    monkeypatch.setattr(os.path, "ismount", lambda path: os.fspath(path) == str(target))
    write(target, overwrite=True)
    assert os.listdir(target) == ["report.json"]
    assert os.listdir(tmp_path) == ["mounted"]


@pytest.mark.parametrize("mounted", [False, True])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O")])
def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch, error, mounted):
    target = tmp_path / "out"
    write(target)
    monkeypatch.setattr(_files, "_stays", lambda path: mounted)
    with (
        pytest.raises(OutputError, match="cannot write"),
        atomic_directory(target, overwrite=True),
    ):
        raise error
    assert os.listdir(target) == ["report.json"]
    assert os.listdir(tmp_path) == ["out"]


def test_a_symlink_to_a_directory_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert os.listdir(tmp_path / "real") == ["report.json"]


def test_a_file_that_safetensors_cannot_write_is_an_output_error(tmp_path):
    with (
        pytest.raises(OutputError, match=r"cannot write .*basis: full"),
        atomic_file(tmp_path / "basis"),
    ):
        raise SafetensorError("full")
    assert list(tmp_path.iterdir()) == []
