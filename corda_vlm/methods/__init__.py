"""The ways to fine-tune, side by side under one interface: a name prepares a model, ready to train.

Every method leaves the model's outputs as they were before the first step, up to rounding, and can be undone
with `restore_method`, except full fine-tuning, which keeps nothing of the original.
"""

from __future__ import annotations

from corda_vlm.methods.method import Method, MethodRequest, Prepared
from corda_vlm.methods.registry import (
    METHODS,
    get_method,
    prepare_method,
    register_method,
    restore_method,
)

__all__ = [
    "METHODS",
    "Method",
    "MethodRequest",
    "Prepared",
    "get_method",
    "prepare_method",
    "register_method",
    "restore_method",
]
