"""Folders of classes are read, and are not taken for folders of parts."""

from __future__ import annotations

import pytest

from corda_vlm.data import load_records
from corda_vlm.errors import DataError, UnknownNameError
from tests.data.pictures import check_digits


def test_folder(folder, digits):
    train = load_records({"source": f"folder:{folder}", "split": "train"})
    test = load_records({"source": f"folder:{folder}", "split": "test"})
    check_digits(train, 40)
    assert len(test) == 20
    assert train[0]["class_name"] == train.class_names[train[0]["label"]] == "eight"
    with pytest.raises(UnknownNameError, match="choose one of: test, train"):
        load_records({"source": f"folder:{folder}", "split": "val"})
    assert len(load_records(f"folder:{folder / 'train'}")) == 40
    with pytest.raises(DataError, match=r"holds parts, not classes; say which split: test, train"):
        load_records(f"folder:{folder}")
    (folder / "empty").mkdir()
    with pytest.raises(
        DataError,
        match="holds no pictures; folder: reads one folder a class, or pictures without classes",
    ):
        load_records(f"folder:{folder / 'empty'}")
