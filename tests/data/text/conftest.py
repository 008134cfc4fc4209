"""Pictures for conversations to be about."""

from __future__ import annotations

import pytest


@pytest.fixture
def pictures(tmp_path, digits):
    """A folder of four digits, 0.png to 3.png."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(4):
        (folder / f"{index}.png").write_bytes(digits[index][0])
    return folder
