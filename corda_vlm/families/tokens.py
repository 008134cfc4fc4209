"""Which tokens of a language model count for a covariance."""

from __future__ import annotations

from typing import Literal, get_args

Tokens = Literal["all", "prompt", "response", "image", "text"]
TOKENS: tuple[Tokens, ...] = get_args(Tokens)
