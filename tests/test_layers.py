"""Nothing imports upwards: the order of the modules is part of the design."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import corda_vlm

PACKAGE = Path(corda_vlm.__file__).parent
# From the bottom up. A module may import those on its own level's left, never those on its right.
ORDER = (
    "errors",
    "lazy",
    "extras",
    "text_table",
    "names",
    "registries",
    "options",
    "interrupts",
    "processes",
    "files",
    "yaml_file",
    "command_line",
    "tensors",
    "locks",
    "jsonl",
    "precision",
    "progress",
    "distributed",
    "plugins",
    "run_files",
    "decompose",
    "ranks",
    "families",
    "sites",
    "same_model",
    "data",
    "evaluation",
    "covariance",
    "plan",
    "adapter",
    "anchor",
    "methods",
    "train",
    "report",
    "experiment",
    "integrations",
    "__init__",
    "verbs",
    "__main__",
)


def layer(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_layers(path: Path) -> set[str]:
    """The top-level modules of corda_vlm that `path` imports anywhere, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write absolute imports"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "corda_vlm":
                child = parts[1] if len(parts) > 1 else "__init__"
                is_module = (PACKAGE / child).is_dir() or (PACKAGE / f"{child}.py").exists()
                found.add(child if is_module else "__init__")
    return found


SOURCES = sorted(p for p in PACKAGE.rglob("*.py") if "_assets" not in p.parts)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_only_downwards(path: Path) -> None:
    mine = layer(path)
    assert mine in ORDER, f"{mine} has no place in the order; add it to ORDER where it belongs"
    below = set(ORDER[: ORDER.index(mine)])
    upwards = imported_layers(path) - below - {mine}
    assert not upwards, f"{path.name} imports upwards: {sorted(upwards)}"


def imported_modules(path: Path) -> set[str]:
    """The modules, of any package, that `path` imports anywhere."""
    tree = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    found = set()
    for node in tree:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module))
    return found


def test_only_the_pictures_import_matplotlib() -> None:
    drawing = {
        str(path.relative_to(PACKAGE).parent)
        for path in SOURCES
        if any(name.split(".")[0] == "matplotlib" for name in imported_modules(path))
    }
    assert drawing == {"report/plots"}


def test_analysis_draws_nothing() -> None:
    for path in (PACKAGE / "report" / "analysis").glob("*.py"):
        assert not [name for name in imported_modules(path) if "report.plots" in name], path.name


def test_no_utils() -> None:
    assert not [p for p in SOURCES if "util" in p.stem or "helper" in p.stem]


def test_every_public_name_is_there() -> None:
    for name in corda_vlm.__all__:
        assert getattr(corda_vlm, name) is not None, name
    with pytest.raises(AttributeError, match="no attribute 'adpat'"):
        _ = corda_vlm.adpat
