"""The modules of another tool, imported when they are needed."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from corda_vlm.errors import CordaError, brief


def module_of(package: str, module: str, tool: str, requirements: str) -> Any:
    """`package.module`.

    Args:
        tool: what the package's people call it.
        requirements: what pip is asked for.

    Raises:
        CordaError: the package, or what it needs, is not installed.
    """
    try:
        return import_module(f"{package}.{module}")
    except ModuleNotFoundError as error:
        raise CordaError(
            f"this needs {tool}, and {brief(error.name)} is not installed: pip install {requirements}"
        ) from error
