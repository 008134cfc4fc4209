"""All tests run with the package's annotations checked (shapes and types), and with its warnings as errors."""

from __future__ import annotations

import ast
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch

import corda_vlm
from corda_vlm.decompose import decompose, relative_damage
from corda_vlm.errors import CordaError

PACKAGE = Path(corda_vlm.__file__).parent
SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if "_assets" not in path.parts)
OTHERS: Any = {"damping": 1e-4, "a_norm": None, "route": "auto", "seed": 0}
ARRAYS = {"Bool", "Float", "Int", "Num", "Shaped"}


def test_a_matrix_of_another_shape_is_caught() -> None:
    delta = torch.ones(6, 2), torch.ones(2, 8)
    assert relative_damage(delta, torch.ones(6, 8), torch.eye(8)) == pytest.approx(4)
    with pytest.raises(jaxtyping.TypeCheckError, match="inp=8"):
        relative_damage(delta, torch.ones(6, 8), torch.eye(7))


def test_a_value_of_another_type_is_caught() -> None:
    with pytest.raises(jaxtyping.TypeCheckError, match="rank"):
        decompose(torch.eye(4), rank="2", **OTHERS)  # pyright: ignore[reportArgumentType]


def test_our_own_errors_come_first_where_a_test_expects_them() -> None:
    wrong = torch.eye(7)
    with pytest.raises(CordaError, match=r"\(7, 7\)"):
        decompose(torch.eye(4), wrong, rank=2, **OTHERS)
    with pytest.raises(jaxtyping.TypeCheckError):
        decompose(torch.eye(4), wrong, rank=2, **OTHERS)


def test_a_warning_about_our_own_code_is_an_error() -> None:
    for kind in (UserWarning, DeprecationWarning, FutureWarning):
        with pytest.raises(kind, match="about to go"):
            warnings.warn_explicit("about to go", kind, "make.py", 1, module="corda_vlm.plan.make")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_shape_can_be_read(path: Path) -> None:
    """A name that an annotation mentions but that is imported for type checkers alone switches its check off silently."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    shapes = [
        annotation
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for annotation in (getattr(node, "annotation", None), getattr(node, "returns", None))
        if annotation is not None
        and any(isinstance(n, ast.Name) and n.id in ARRAYS for n in ast.walk(annotation))
    ]
    if not shapes:
        return
    names = vars(import_module(".".join(parts).removesuffix(".__init__")))
    for annotation in shapes:
        eval(ast.unparse(annotation), dict(names))  # a NameError names what is missing
