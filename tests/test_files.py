from __future__ import annotations

import errno
import subprocess
import sys
import time

import pytest
from safetensors import SafetensorError

from corda_vlm.errors import CordaError, ForeignFileError, UnknownNameError
from corda_vlm.files import asset, atomic_write, read_json, resolve, write_json


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
