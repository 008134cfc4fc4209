"""Tasks of lm-eval and lmms-eval, as a list and as a text."""

from __future__ import annotations

import pytest

from corda_vlm.errors import CordaError
from corda_vlm.integrations.tasks import as_tasks


def test_a_text_is_names_and_no_letters():
    assert as_tasks("pope, ok_vqa") == ["pope", "ok_vqa"]
    own = {"task": "own"}
    assert as_tasks(("pope", own)) == ["pope", own]


@pytest.mark.parametrize("none", ["", " , ", []])
def test_none_is_refused(none):
    with pytest.raises(CordaError, match="no task is given"):
        as_tasks(none)
