"""Whether code that comes with a model may run: not unless `load_model(..., trust_remote_code=True)` says so.

transformers imports Python files of a model's folder or repository where its JSON files ask for that (`auto_map`), if it
is told to trust them, and asks on the terminal if it is told nothing. Other libraries tell it on a model's behalf:
open_clip hands the tokenizer's options of a model's own configuration on, `trust_remote_code` included. So that all of
them are met, what imports such files is out of order while a model is loaded.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from corda_vlm.errors import CordaError

_trusted: ContextVar[bool] = ContextVar("_trusted", default=False)
_IMPORTS = ("get_cached_module_file", "get_class_in_module", "get_class_from_dynamic_module")
_GENERATE = "custom_generate/generate.py"
_guard = threading.RLock()  # the functions are replaced for all threads

REFUSAL = (
    "asks to run Python code that comes with it, which is not done: a model is data. Where you have read that code and "
    "trust it, pass trust_remote_code=True to load_model, or --trust-remote-code"
)


class RemoteCodeError(CordaError):
    """A model wants code of its own to be run."""


def trusted() -> bool:
    """What to pass on as `trust_remote_code`."""
    return _trusted.get()


@contextmanager
def loading(trust_remote_code: bool) -> Iterator[None]:
    """Load a model within; without trust nothing of its own is imported, and nobody is asked."""
    token = _trusted.set(trust_remote_code)
    try:
        if trust_remote_code:
            yield
        else:
            with _nothing_imported():
                yield
    finally:
        _trusted.reset(token)


@contextmanager
def _nothing_imported() -> Iterator[None]:
    import transformers.dynamic_module_utils as dynamic

    def refuse(*names: Any, **options: Any) -> Any:
        if (
            options.get("module_file") == _GENERATE
        ):  # looked for with every model, and gone on without
            raise OSError(f"{_GENERATE} is code, and not run")
        raise RemoteCodeError(f"the model {REFUSAL} ({', '.join(map(str, names))[:200]})")

    with _guard:
        former = {name: getattr(dynamic, name) for name in _IMPORTS}
        seconds = dynamic.TIME_OUT_REMOTE_CODE
        for name, function in former.items():
            _replace(name, function, refuse)
        dynamic.TIME_OUT_REMOTE_CODE = 0  # for an answer on the terminal
        try:
            yield
        finally:
            for name, function in former.items():
                _replace(name, refuse, function)
            dynamic.TIME_OUT_REMOTE_CODE = seconds


def _replace(name: str, former: Any, function: Any) -> None:
    """Put `function` in the place of `former` in every module of transformers, as modules import it by its name.

    transformers 4.57 runs `custom_generate/generate.py` of a folder by such a name, also where it is told to trust nothing.
    """
    for known_as, module in list(sys.modules.items()):
        ours = known_as.partition(".")[0] == "transformers" and module is not None
        if ours and vars(module).get(name) is former:
            setattr(module, name, function)


def wants_code(error: BaseException) -> bool:
    """Was something not loaded because code would have had to run?"""
    return isinstance(error, RemoteCodeError) or "trust_remote_code" in str(error)


def check_config(options: Any, where: str) -> None:
    """Refuse a model's own configuration that names code or leads out of the model; nested ones too.

    Raises:
        RemoteCodeError: it says to trust code, or names a kernel of a hub, which is code.
    """
    if trusted():
        return
    pending = [options]
    while pending:
        one = pending.pop()
        if isinstance(one, Mapping):
            pending += one.values()
            if one.get("trust_remote_code"):
                raise RemoteCodeError(f"{where} {REFUSAL} (trust_remote_code)")
            for key in ("attn_implementation", "_attn_implementation", "experts_implementation"):
                kernel = one.get(key)
                if isinstance(kernel, str) and ("/" in kernel or ":" in kernel):
                    raise RemoteCodeError(f"{where} {REFUSAL} ({key}: {kernel[:100]})")
        elif isinstance(one, list):
            pending += one
