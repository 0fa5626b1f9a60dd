import numpy as np
import pandas as pd
import pytest

from cxrfast.errors import ShardError
from cxrfast.shards.upkeep.kept_counts import MOST_VALUES, kept_tables, may_identify

SHORT = pd.Series(["a", "b"] * 50)


@pytest.mark.parametrize(
    "name",
    [
        "PatientName",
        "patient_nr",
        "MRN",
        "Birth date",
        "DateOfBirth",
        "Geburtsdatum",
        "AccessionNumber",
        "Study-ID",
        "StudyInstanceUID",
        "Radiologist",
        "Comment",
        "Postal code",
        "Patient",
        "Fallnummer",
        "Tel.",
    ],
)
def test_columns_that_may_identify_patients_are_known_by_their_names(name):
    assert may_identify(name, SHORT)


@pytest.mark.parametrize(
    "name",
    ["Age", "Sex", "Scanner", "Patient Age", "Patient Gender", "Hospital", "kVp", "Position", "Manufacturer", "Idiom"],
)
def test_columns_of_groups_are_no_threat(name):
    assert not may_identify(name, SHORT)


def test_values_that_occur_once_may_identify_patients_whatever_the_column_is_called():
    texts = pd.Series([f"Person {n}" for n in range(100)])
    assert may_identify("x", texts)
    assert not may_identify("x", pd.Series([f"Ward {n % 30}" for n in range(100)]))
    assert may_identify("x", pd.Series(np.arange(48_000.0, 48_100)))
    assert not may_identify("Age in months", pd.Series(np.arange(100.0)))
    assert not may_identify("Dose", pd.Series(np.arange(2000.0, 2100) + 0.25))


def rows(**kept: list) -> pd.DataFrame:
    n = len(next(iter(kept.values())))
    fixed = {"patient_id": [f"p{i // 2}" for i in range(n)], "split": None, "fold": np.arange(n) % 5}
    return pd.DataFrame({**fixed, **{f"kept/{name}": values for name, values in kept.items()}})


def test_text_is_counted_by_value_image_patient_part_and_fold():
    frame = rows(Sex=["F", "F", "M", None, "F", "M", "M", "F", "F", None])
    (table,) = kept_tables(frame)
    assert table.head == ["Column", "Value", "Images", "Patients", *(f"fold {k}" for k in range(5))]
    assert table.rows == [
        ["Sex", "F", "5", "4", "1", "1", "1", "1", "1"][:9],
        ["Sex", "M", "3", "3", "1", "1", "1", "0", "0"],
        ["Sex", "(blank)", "2", "2", "0", "0", "0", "1", "1"],
    ]
    frame["split"] = ["train"] * 8 + ["test"] * 2
    (table,) = kept_tables(frame)
    assert table.head[4:6] == ["train", "test"]
    assert [line[4:6] for line in table.rows] == [["4", "1"], ["3", "0"], ["1", "1"]]


def test_only_the_most_frequent_values_are_listed():
    (table,) = kept_tables(rows(Scanner=[f"s{n % 30}" for n in range(90)]))
    assert len(table.rows) == MOST_VALUES + 1
    assert table.rows[-1][1:3] == ["10 other values", "30"]


def test_numbers_are_summed_up_by_part_and_fold():
    (table,) = kept_tables(rows(Age=[*map(float, range(9)), np.nan]))
    assert table.rows[0] == ["Age", "all", "9", "1", "4", "2 to 6", "0 to 8"]
    assert table.rows[5] == ["Age", "fold 4", "1", "1", "4", "4 to 4", "4 to 4"]
    assert [line[1] for line in table.rows] == ["all", *(f"fold {k}" for k in range(5))]


def test_a_column_that_was_not_kept_is_named_with_those_that_were():
    with pytest.raises(
        ShardError, match=r"--show 'sex': the set kept no such column: did you mean 'Sex'\? it kept: Sex"
    ):
        kept_tables(rows(Sex=["F", "M"]), ["sex"])
    assert kept_tables(rows(Sex=["F", "M"]).drop(columns="kept/Sex")) == []
