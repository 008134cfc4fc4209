"""Reading what is at a path, and formats that others bring."""

from __future__ import annotations

from pathlib import Path

import pytest

from corda_vlm.errors import CordaError, ForeignFileError
from corda_vlm.report.formats import registry
from corda_vlm.report.formats.base import Format, Measure, Measured
from corda_vlm.report.formats.registry import FORMATS, read_results, register_format


def own_format(name: str = "lines") -> Format:
    def read(files: list[Path]) -> list[Measured]:
        tasks = [one.read_text().split() for one in files]
        return [
            Measured("", (name,), tuple(Measure(t, "acc", float(v), files[0]) for t, v in tasks))
        ]

    return Format(
        name, "*.score", lambda files: [one for one in files if one.suffix == ".score"], read
    )


@pytest.fixture
def formats(monkeypatch):
    monkeypatch.setattr(registry, "FORMATS", dict(FORMATS))


@pytest.mark.usefixtures("formats")
def test_a_format_of_somebody_else(tmp_path):
    register_format(own_format())
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "a.score").write_text("arc 0.5")
    (model,) = read_results(tmp_path / "run")
    assert (model.name, model.of("arc").value) == ("run", 0.5)
    with pytest.raises(CordaError, match="'lines' is registered already"):
        register_format(own_format())


def test_nothing_that_is_read_lists_what_is(tmp_path):
    (tmp_path / "table.xlsx").write_bytes(b"x")
    with pytest.raises(ForeignFileError) as error:
        read_results(tmp_path)
    for name in ("lm-eval", "lmms-eval", "CLIP_benchmark", "VLMEvalKit", "corda_vlm"):
        assert f"{name} (" in str(error.value)


def test_a_folder_that_is_too_large_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_MOST_FILES", 3)
    for n in range(4):
        (tmp_path / f"{n}.json").write_text("{}")
    with pytest.raises(CordaError, match="give the folder of the results alone"):
        read_results(tmp_path)


def test_hidden_files_and_links_of_folders_are_left_alone(tmp_path):
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "results_2026-08-01T12-00-00.000001.json").write_text("{broken")
    (tmp_path / "loop").symlink_to(tmp_path)
    with pytest.raises(ForeignFileError, match="no results that are read here"):
        read_results(tmp_path)
