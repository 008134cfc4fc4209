"""Small real models, and what the recipes of `configs/integrations/` are run with."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from corda_vlm import asset
from tests.integrations.starts import export_starts, write_task
from tests.integrations.tools import ROOT, TOOLS, Tool

SMOLLM2 = ROOT / "runs" / "bench" / "SmolLM2-135M-Instruct.gguf"


@pytest.fixture(scope="module")
def tool(request: pytest.FixtureRequest) -> Tool:
    """That of the test's file, `test_NAME.py`."""
    found = TOOLS[request.path.stem.removeprefix("test_")]
    if not found.ready:
        pytest.skip(f"{found.name} is not installed in {found.place}: `make integrations` does it")
    return found


@pytest.fixture
def measured(record_property: Any) -> Callable[[str], None]:
    """Notes for the table what a check found, in a few words."""
    return lambda text: record_property("measured", text)


@pytest.fixture
def recipe() -> Callable[[str], Any]:
    """Imports a script of `configs/integrations/`."""

    def load(name: str) -> Any:
        path = asset(f"configs/integrations/{name}.py")
        spec = importlib.util.spec_from_file_location(f"recipe_{name}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def smollm2_4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct, a real language model, cut to its first 4 layers: a folder for transformers."""
    if not SMOLLM2.is_file():
        pytest.skip(f"{SMOLLM2.relative_to(ROOT)} is not here: `make {SMOLLM2.relative_to(ROOT)}`")
    kept = ROOT / "runs" / "integrations" / "smollm2-4"
    if (kept / "config.json").is_file():
        return kept
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from corda_vlm.families.loading.gguf import converted
    from corda_vlm.files import atomic_folder

    source = converted(SMOLLM2)
    model = AutoModelForCausalLM.from_pretrained(source, num_hidden_layers=4, dtype=torch.float32)
    kept.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(kept) as folder:
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return kept


@pytest.fixture(scope="module")
def starts(smollm2_4: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Format -> an export of one start, beside the records of a task, `task.json`."""
    folder = tmp_path_factory.mktemp("starts")
    write_task(folder)
    return export_starts(smollm2_4, folder)
