import numpy as np
import pandas as pd
import pytest

from cxrfast.errors import ShardError
from cxrfast.shards.format.rows import RESERVED
from cxrfast.shards.sources.kept import kept_columns, notes_on_commas
from cxrfast.shards.sources.read import read_source
from cxrfast.shards.sources.source import Source, checked
from cxrfast.shards.storage import Tree

NAN = np.nan


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["61", "0", "-3.5", "+2"], [61, 0, -3.5, 2]),
        (["61", None, " ", "NA", "nan"], [61, NAN, NAN, NAN, NAN]),
        (["5,7", "12", "0,125"], [5.7, 12, 0.125]),
        (["1,234", "0,5"], [1.234, 0.5]),
        (["999999999999999"], [999999999999999]),
    ],
)
def test_a_column_whose_values_are_all_numbers_becomes_numbers(texts, expected):
    found = kept_columns(pd.DataFrame({"Age": pd.Series(texts, dtype=object)}), ["Age"])["Age"]
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["F", "M ", "\ufeffM", "", None], ["F", "M", "M", None, None]),
        (["007", "12"], ["007", "12"]),
        (["058Y", "60"], ["058Y", "60"]),
        (["2024-01-31"], ["2024-01-31"]),
        (["1234567890123456"], ["1234567890123456"]),
        (["1e5", "3"], ["1e5", "3"]),
        (["inf", "3"], ["inf", "3"]),
        (["1,234", "12"], ["1,234", "12"]),
        (["1,5", "2.5"], ["1,5", "2.5"]),
        (["NA", "Canon"], ["NA", "Canon"]),
        (["NA", ""], ["NA", None]),
        ([None, " "], [None, None]),
    ],
)
def test_every_other_column_stays_text_and_its_blanks_stay_blank(texts, expected):
    found = kept_columns(pd.DataFrame({"x": pd.Series(texts, dtype=object)}), ["x"])["x"]
    assert [None if pd.isna(value) else value for value in found] == expected


def test_lines_say_how_commas_were_read():
    table = pd.DataFrame({"a": ["1,5", "2"], "b": ["1,234", ""], "c": ["x, y", "z"], "d": ["1", "2"]})
    assert notes_on_commas(table, kept_columns(table, list("abcd"))) == (
        "decimal commas read as points: a",
        "kept as text, since commas there may be decimal or separate thousands: b",
    )


def images(**columns) -> pd.DataFrame:
    ids = [f"i{n}" for n in range(4)]
    return pd.DataFrame(
        {"image_id": ids, "study_id": ids, "patient_id": ids, "path": ids, "Mass": 1.0, **columns}, index=range(2, 6)
    )


def check(kept: tuple[str, ...], **columns) -> Source:
    return checked(Source(images=images(**columns), labels=("Mass",), counts={}, kept=kept), Tree("/data"))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, 2, 3, 4], [1.0, 2.0, 3.0, 4.0]),
        ([True, False, True, True], [1.0, 0.0, 1.0, 1.0]),
        (pd.array([1, None, 3, 4], "Int64"), [1.0, NAN, 3.0, 4.0]),
        (["F", None, " ", "M"], ["F", None, None, "M"]),
        (pd.Categorical(["F", None, "M", "M"]), ["F", None, "M", "M"]),
        (pd.array(["F", None, "M", "M"], "string"), ["F", None, "M", "M"]),
        ([None] * 4, [None] * 4),
    ],
)
def test_a_function_of_one_s_own_may_keep_numbers_and_text(values, expected):
    source = check(("x",), x=values)
    found = source.images["kept/x"]
    assert [None if pd.isna(v) else v for v in found] == [None if pd.isna(v) else v for v in expected]
    assert source.kept == ("x",)
    assert "x" not in source.images
    blank = f" (blank for {n} image{'s' * (n > 1)})" if (n := int(found.isna().sum())) else ""
    assert source.notes == (f"kept: x as {'numbers' if found.dtype == np.float64 else 'text'}{blank}",)


@pytest.mark.parametrize(
    ("kept", "columns", "message"),
    [
        (("x",), {}, "were listed without the columns x"),
        (("x", "x"), {"x": 1}, "--keep x is given twice"),
        (("Mass",), {}, "--keep Mass: this column is a label already"),
        (("",), {"": 1}, "kept column ''"),
        ((" x",), {" x": 1}, "the kept column ' x' starts or ends with a blank"),
        (("=x",), {"=x": 1}, "would be run as a formula"),
        (("x\n",), {"x\n": 1}, r"holds the character U\+000A"),
        (("x" * 201,), {"x" * 201: 1}, "has 201 characters"),
        (("x",), {"x": ["a", "=1+1", "b", "=2"]}, r"kept column x holds .* in lines 3, 5: '=1\+1' would be run as a formula"),
        (("x",), {"x": ["a", "b", "c\nd", "e"]}, r"in line 4: .* holds the character U\+000A"),
        (("x",), {"x": ["a", "b", "c", "e" * 201]}, "in line 5: .* has 201 characters"),
        (("x",), {"x": [1.0, np.inf, 0, 0]}, "hold inf for the kept column x in line 3: numbers must be finite"),
        (("x",), {"x": [1, 2, 3, 2**60]}, r"in line 5: .*below 2\*\*53"),
        (("x",), {"x": ["a", 1, 2, 3]}, "with mixed.* for the kept column x: give numbers or text"),
        (("x",), {"x": pd.to_datetime(["2024"] * 4)}, "for the kept column x: give numbers or text"),
        *(((name,), {name: 1}, f"--keep {name}: rows.parquet has a column") for name in sorted(RESERVED - {"image_id", "study_id", "patient_id", "path"})),
    ],
)  # fmt: skip
def test_columns_that_cannot_be_kept_are_refused(kept, columns, message):
    with pytest.raises(ShardError, match=message):
        check(kept, **columns)


def test_a_label_cannot_be_called_as_kept_columns_are():
    frame = images().rename(columns={"Mass": "kept/Mass"})
    with pytest.raises(ShardError, match="a label cannot be called 'kept/Mass'"):
        checked(Source(images=frame, labels=("kept/Mass",), counts={}), Tree("/data"))


def test_a_mistyped_column_is_named_with_the_one_that_is_meant(tmp_path):
    pd.DataFrame({"path": ["1.png"], "patient_id": ["a"], "Age": ["6"], "Mass": ["1"]}).to_csv(tmp_path / "t.csv")
    options = {"table": "t.csv", "label": ["Mass"], "keep": ["age"]}
    with pytest.raises(ShardError, match="lacks the columns age: did you mean 'Age'"):
        read_source("table", tmp_path, options)
