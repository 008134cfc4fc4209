"""Packages that only some work needs: imported when that work is asked for, and named with their extra where they are missing."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from corda_vlm.errors import CordaError


def require(module: str, extra: str, work: str) -> Any:
    """The module of a package that `pip install corda-vlm` alone need not bring.

    Args:
        module: as Python imports it, e.g. "matplotlib" or "sklearn.datasets".
        extra: the extra of corda-vlm that brings it, e.g. "report".
        work: what needs it, as the beginning of a sentence, e.g. "Drawing pictures".

    Raises:
        CordaError: it is not installed; the message names the extra.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise  # the package is there, and lacks one of its own
        raise _missing(package, extra, work) from error


def check_installed(module: str, extra: str, work: str) -> None:
    """Raise what `require` would, without importing anything."""
    package = module.partition(".")[0]
    if find_spec(package) is None:
        raise _missing(package, extra, work)


def _missing(package: str, extra: str, work: str) -> CordaError:
    return CordaError(
        f"{work} needs the package {package}, which is not installed: pip install 'corda-vlm[{extra}]'"
    )
