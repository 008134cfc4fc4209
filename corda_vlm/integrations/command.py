"""What `python -m` of an integration's module does: what goes wrong ends in words and with a status."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from corda_vlm.errors import CordaError


def run_command(name: str, main: Callable[[], Any]) -> None:
    """Call `main`. Wrong input ends with its message and status 2, as with `corda-vlm`.

    Args:
        name: of the module, before the message.
    """
    try:
        main()
    except CordaError as error:
        print(f"{name}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
