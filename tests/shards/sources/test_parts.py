"""Split columns: the usual words, folds of the user's own, and patients in two parts."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxrfast.errors import ShardError
from cxrfast.shards.sources.parts import WORDS, checked_folds, read_parts, shared_in_words
from cxrfast.shards.sources.source import Source, checked
from cxrfast.shards.storage import Tree


def column(*values: str | None) -> pd.Series:
    return pd.Series(values, range(2, len(values) + 2), dtype=object, name="part")


@given(st.lists(st.sampled_from([*WORDS, ""]), min_size=1, max_size=9).filter(any))
def test_words_become_parts_and_blanks_no_part(words):
    found = read_parts(column(*(f" {word.title()} " for word in words)), "t.csv")
    assert found.keys() == {"split"}
    assert found["split"].fillna("").tolist() == [WORDS.get(word, "") for word in words]


@pytest.mark.parametrize("form", ["{}", "fold{}", "Fold {}", "fold_{}", "FOLD-{}", "{}.0", " {} "])
@given(order=st.permutations([0, 1, 2, 3, 4, 4, 0]))
def test_numbers_from_0_to_4_are_folds(form, order):
    found = read_parts(column(*(form.format(fold) for fold in order)), "t.csv")
    assert found.keys() == {"fold"}
    assert found["fold"].tolist() == order


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            ["train", "holdout", ""],
            "t.csv holds 'holdout' for part in line 3: use train, validate, test or blank; or, in",
        ),
        (["train", "0", "test"], "t.csv holds '0' for part in line 3: use train, validate, test or blank"),
        (["train", "nan"], "holds 'nan' for part in line 3"),
        (["", " ", None], "t.csv: part is blank in every line: name another column for the split, or none"),
        (["1", "2", "3", "4", "5"], r"t.csv \(part\) holds the folds 1, 2, 3, 4, 5: number them 0 to 4"),
        (["0", "1", "2", "3"], r"holds the folds 0, 1, 2, 3: number them 0 to 4"),
        (["0", "1", "1"], r"holds the folds 0, 1: number them 0 to 4"),
        (["0", "1", "2", "3", "4", "7"], r"holds the folds 0, 1, 2, 3, 4, 7: number them"),
        (
            ["fold0", "fold1", "", "fold2", "fold3", "fold4"],
            "part holds folds and is blank in line 4: give every image one",
        ),
        ([str(i) for i in range(30)], r"holds the folds 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, …: number"),
    ],
)
def test_other_words_and_folds_are_refused_with_what_they_are(values, message):
    with pytest.raises(ShardError, match=message):
        read_parts(column(*values), "t.csv")


@pytest.mark.parametrize("values", [[0, 1, 2, 3, None], [0, 1, 2, 3, 4.5], ["a", 0, 1, 2, 3], [0, 0, 0, 0, 0]])
def test_folds_of_a_source_function_are_0_to_4_for_every_image(values):
    with pytest.raises(ShardError, match=r"holds the folds .*: number them 0 to 4"):
        checked_folds(pd.Series(values), "the tables")


def images(split: list[str | None], patient: list[str], **more: list) -> pd.DataFrame:
    names = [f"i{n}" for n in range(len(split))]
    ids = {"image_id": names, "study_id": names, "patient_id": patient, "path": [f"{name}.png" for name in names]}
    return pd.DataFrame({**ids, "split": split, "Mass": 1.0, **more})


def test_a_patient_in_two_parts_is_named_with_lines_and_blank_is_no_part():
    split = ["train", "test", None, "train", "validate", "test", "train"]
    frame = images(split, ["a", "a", "b", "b", "b", "c", "d"])
    source = checked(Source(images=frame.set_axis(range(2, 9)), labels=("Mass",), counts={}), Tree("/data"))
    assert source.shared == (
        "2 patients with 4 images are in more than one part, such as line 2 (patient a) in train and line 3 (patient a) in "
        "test; line 5 (patient b) in train and line 6 (patient b) in validate"
    )
    assert shared_in_words(frame).startswith(
        "2 patients with 4 images are in more than one part, such as image i0 (patient a)"
    )
    alone = checked(Source(images=images([None, "test"], ["a", "a"]), labels=("Mass",), counts={}), Tree("/data"))
    assert alone.shared == ""


def test_a_patient_in_two_folds_is_named():
    frame = images([None] * 6, ["a", "a", "b", "c", "d", "e"], fold=[0, 4, 1, 2, 3, 4])
    source = checked(Source(images=frame, labels=("Mass",), counts={}), Tree("/data"))
    assert source.shared == (
        "1 patient with 2 images is in more than one part, such as image i0 (patient a) in fold 0 and image i1 (patient a) in "
        "fold 4"
    )
    np.testing.assert_array_equal(source.images["fold"], frame["fold"])
