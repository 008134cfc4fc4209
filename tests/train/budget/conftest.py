"""Questions that a tiny language model is asked."""

from __future__ import annotations

from tests.train.terms.conftest import questions  # noqa: F401
