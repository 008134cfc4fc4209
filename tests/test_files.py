from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors import SafetensorError

from corda_vlm.errors import CordaError, ForeignFileError, UnknownNameError
from corda_vlm.files import (
    asset,
    atomic_folder,
    atomic_write,
    clear,
    entries,
    read_json,
    resolve,
    sweep,
    write_json,
    write_text,
)
from corda_vlm.processes import Process, _host, this_process
from corda_vlm.tensors import save_tensors


def test_asset_finds_shipped_files_and_lists_the_folder_otherwise():
    assert asset("configs").is_dir()
    with pytest.raises(
        CordaError, match=r"no shipped asset 'configs/nothing\.yaml'; configs/ has:"
    ):
        asset("configs/nothing.yaml")


def test_resolve_prefers_the_given_path_then_beside_then_assets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "x.json").write_text("1")
    assert resolve("x.json", beside=tmp_path / "sub" / "config.yaml") == tmp_path / "sub" / "x.json"
    (tmp_path / "x.json").write_text("2")
    assert (
        resolve("x.json", beside=tmp_path / "sub" / "config.yaml").resolve() == tmp_path / "x.json"
    )
    with pytest.raises(CordaError, match="looked at"):
        resolve("absent.json")


def test_a_failed_write_keeps_the_old_file_and_leaves_no_partial(tmp_path):
    target = tmp_path / "value.json"
    write_json(target, {"a": 1})
    with pytest.raises(RuntimeError, match="boom"), atomic_write(target) as partial:
        partial.write_text("half")
        raise RuntimeError("boom")
    assert read_json(target) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["value.json"]


def test_a_full_disk_is_named_and_the_old_file_stays(tmp_path):
    target = tmp_path / "value.json"
    write_json(target, {"a": 1})
    full = pytest.raises(CordaError, match=r"could not write .*value\.json: No space")
    with full, atomic_write(target):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert read_json(target) == {"a": 1}


def test_safetensors_own_error_of_a_full_disk_is_named_too(tmp_path):
    full = pytest.raises(CordaError, match=r"could not write .*a\.safetensors: .*os error 28")
    with full, atomic_write(tmp_path / "a.safetensors"):
        raise SafetensorError("I/O error: No space left on device (os error 28)")
    assert not list(tmp_path.iterdir())


def test_a_killed_writer_leaves_the_old_file_whole(tmp_path):
    target = tmp_path / "value.json"
    write_json(target, list(range(10)))
    code = (
        "import sys, time\nfrom corda_vlm.files import atomic_write\n"
        f"with atomic_write({str(target)!r}) as partial:\n"
        "    partial.write_text('half')\n    print('writing', flush=True)\n    time.sleep(60)\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    assert writer.stdout.readline() == "writing\n"
    writer.kill()
    writer.wait()
    time.sleep(0.05)
    assert read_json(target) == list(range(10))
    assert len(list(tmp_path.iterdir())) == 2, "a kill leaves its partial file"
    assert entries(tmp_path) == [target], "which is nobody's work"
    write_json(tmp_path / "another.json", 1)
    assert len(list(tmp_path.iterdir())) == 2, "and goes with the next write into the folder"


def test_only_what_dead_writers_left_is_swept(tmp_path):
    mine, child = this_process(), os.fork()
    if child == 0:
        (tmp_path / f".a.0.{this_process()}.partial").touch()
        (tmp_path / f".folder.0.{this_process()}.partial" / "deep").mkdir(parents=True)
        os._exit(0)
    os.waitpid(child, 0)
    living = tmp_path / f".b.0.{mine}.partial"
    elsewhere = tmp_path / f".c.0.another_host-{2**22 + 1}-17.partial"
    of_somebody = tmp_path / ".notes.partial"
    for kept in (living, elsewhere, of_somebody):
        kept.touch()
    assert len(list(tmp_path.iterdir())) == 5
    sweep(tmp_path)
    assert set(tmp_path.iterdir()) == {living, elsewhere, of_somebody}


@pytest.mark.parametrize("other", ["name", "boot", "namespace"])
def test_what_another_host_of_a_like_name_writes_is_not_swept(tmp_path, monkeypatch, other):
    """Names that differ in their last letter, one name on two machines, containers with numbers of their own."""
    monkeypatch.setattr("socket.gethostname", lambda: "corda-vlm-training-of-llava-worker-0")
    _host.cache_clear()
    here = this_process()
    if other == "name":
        monkeypatch.setattr("socket.gethostname", lambda: "corda-vlm-training-of-llava-worker-1")
    elif other == "boot":
        read = Path.read_text
        monkeypatch.setattr(
            Path, "read_text", lambda path, **k: "x" if path.name == "boot_id" else read(path, **k)
        )
    else:
        monkeypatch.setattr(Path, "readlink", lambda path: Path("pid:[1]"))
    _host.cache_clear()
    try:
        there = this_process()
        assert there.host.startswith("corda_vlm_training_of_llava_work")
        assert (there.host != here.host, there.pid, there.start) == (True, here.pid, here.start)
        # of a process that has ended here, and of whose counterpart elsewhere nothing is known
        (tmp_path / f".a.0.{Process(here.host, 2**22 + 1, 17)}.partial").touch()
        (tmp_path / f".a.0.{Process(there.host, 2**22 + 1, 17)}.partial").touch()
        sweep(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [f".a.0.{here.host}-{2**22 + 1}-17.partial"]  # fmt: skip
    finally:
        _host.cache_clear()


def test_what_is_to_go_last_goes_last_and_in_order(tmp_path, monkeypatch):
    for name in "abcde":
        (tmp_path / name).touch()
    gone, unlink = [], Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda path: (gone.append(path.name), unlink(path)))
    clear(tmp_path, "abce", last=("b", "a"))
    assert gone == ["c", "e", "b", "a"]
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_tensors_are_readable_by_whom_the_umask_lets(tmp_path, umask):
    import torch
    from safetensors.torch import load_file

    former = os.umask(umask)
    try:
        save_tensors(tmp_path / "a.safetensors", {"w": torch.arange(6.0).view(2, 3).T})
    finally:
        os.umask(former)
    mode = stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode)
    assert oct(mode) == oct(0o666 & ~umask)
    assert torch.equal(load_file(tmp_path / "a.safetensors")["w"], torch.arange(6.0).view(2, 3).T)


def test_a_write_through_a_link_keeps_the_link(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "elsewhere" / "real.json")
    write_json(tmp_path / "link.json", 5)
    assert (tmp_path / "link.json").is_symlink()
    assert read_json(tmp_path / "elsewhere" / "real.json") == 5


UNUSABLE = {
    "a folder": ("folder", "it is a folder"),
    "a parent that is a file": ("file.json/x/y.json", "file.json is a file, not a folder"),
    "a device": ("pipe", "a device or a pipe"),
    "below a device": ("pipe/x", "pipe is a file, not a folder"),
    "too long a name": ("x" * 300, "choose a shorter name"),
    "too long a path": ("x/" * 4000 + "y", "choose a shorter name"),
    "a NUL": ("a\0b", "NUL"),
    "a loop of links": ("loop/x", "could not write"),
    "no system that can be written to": ("/proc/corda/x", "could not write"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_place_that_cannot_be_written_is_named(tmp_path, case):
    name, reason = UNUSABLE[case]
    (tmp_path / "folder").mkdir()
    (tmp_path / "file.json").write_text("1")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")  # not one of /dev: who may write there could lose it to a mistake
    before = sorted(tmp_path.iterdir())
    for write in (lambda path: write_text(path, "x"), _write_folder):
        if case == "a folder" and write is _write_folder:
            continue
        with pytest.raises(CordaError, match=reason) as raised:
            write(name if name.startswith("/") else tmp_path / name)
        assert len(str(raised.value)) < 2000
    assert sorted(tmp_path.iterdir()) == before


def _write_folder(path):
    with atomic_folder(path) as partial:
        (partial / "x").touch()


def test_a_folder_without_permission_says_so_and_hides_no_error(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("pathlib.Path.touch", refuse)
    monkeypatch.setattr("pathlib.Path.unlink", refuse)  # used to be raised in place of the first
    with pytest.raises(CordaError, match=r"Permission denied.*you may write to"):
        write_text(tmp_path / "a", "x")


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    target = tmp_path / "out"
    for name in "ab":
        with atomic_folder(target) as partial:
            (partial / name).touch()
        assert [p.name for p in target.iterdir()] == [name]
    with pytest.raises(CordaError, match="No space"), atomic_folder(target) as partial:
        raise OSError(errno.ENOSPC, "No space left on device")
    assert [p.name for p in target.iterdir()] == ["b"]
    assert list(tmp_path.iterdir()) == [target]


def test_messages_fit_a_screen():
    assert len(str(CordaError("x" * 10_000))) < 2000
    assert len(str(UnknownNameError("site", "y" * 5000, map(str, range(5000))))) < 2000


def test_read_json_names_a_truncated_file(tmp_path):
    (tmp_path / "plan.json").write_text('{"a": [1, 2')
    with pytest.raises(ForeignFileError, match=r"plan\.json is not a plan file"):
        read_json(tmp_path / "plan.json", "plan")
    with pytest.raises(ForeignFileError, match="no plan file at"):
        read_json(tmp_path / "absent.json", "plan")


def test_an_unknown_name_lists_the_choices_and_the_nearest():
    message = str(UnknownNameError("method", "corda-kmp", ["lora", "corda-kpm"]))
    assert "corda-kpm, lora" in message
    assert "Did you mean 'corda-kpm'?" in message


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe", b"[" * 100_000, b'{"a":', b"1" * 10_000, b"", b"\0"],
    ids=["not UTF-8", "deep", "cut", "a number of ten thousand digits", "empty", "NUL"],
)
def test_read_json_names_what_is_no_json(tmp_path, content):
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(ForeignFileError, match=r"plan\.json is not a plan file") as raised:
        read_json(tmp_path / "plan.json", "plan")
    assert len(str(raised.value)) < 2000


@pytest.mark.parametrize("name", ["folder", "pipe", "x" * 300, "a\0b", "loop"])
def test_read_json_names_what_is_no_file(tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ForeignFileError):
        read_json(tmp_path / name, "plan")


def test_resolve_names_what_is_no_path():
    for path in ("x" * 300, "a\0b", "~nosuchuser/x"):
        with pytest.raises(CordaError):
            resolve(path)


def test_a_folder_takes_the_place_of_folders_alone(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CordaError, match="not a folder"), atomic_folder(tmp_path / "pipe"):
        pass
    assert (tmp_path / "pipe").is_fifo(), "it was replaced"
