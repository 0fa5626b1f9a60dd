import io
import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxrfast.errors import ShardError
from cxrfast.shards.sources.tables.text_columns import BLANK, filled, lines, notes_on_words, pixels, raw_labels


@settings(max_examples=30)
@given(st.lists(st.sampled_from([1.0, 0.0, -1.0, np.nan]), max_size=30))
def test_labels_come_back_from_whatever_pandas_writes(values):
    text = pd.DataFrame({"Edema": values, "x": 0}).to_csv(index=False)
    column = pd.read_csv(io.StringIO(text), dtype=str)["Edema"]
    labels = raw_labels(column, "t")
    assert labels.dtype == np.float32
    np.testing.assert_array_equal(labels, np.array(values, np.float32))


@settings(max_examples=50)
@given(st.text("019.-+ e_\tNnaTtruefls−", max_size=5))
def test_a_label_is_one_of_four_values_or_an_error_that_names_it(text):
    column = pd.Series(["1", text], [2, 3], dtype=object, name="Edema")
    words = {**dict.fromkeys(BLANK, np.nan), "true": 1.0, "false": 0.0}
    try:
        value = words[text.strip().lower()] if text.strip().lower() in words else float(text)
    except ValueError:
        value = np.inf
    if value in (1, 0, -1) or np.isnan(value):
        np.testing.assert_equal(raw_labels(column, "t.csv")[3], np.float32(value))
    else:
        with pytest.raises(ShardError, match=re.escape(f"t.csv holds {text!r} for Edema in line 3")):
            raw_labels(column, "t.csv")


def test_sizes_are_whole_pixels_or_unknown():
    column = pd.Series(["3056", "3056.0", None, "", "0"], dtype=object, name="Rows")
    np.testing.assert_array_equal(pixels(column, "t"), [3056, 3056, np.nan, np.nan, 0])
    for text in ("-1", "2.5", "tall", "inf", "true", str(2**31)):
        with pytest.raises(ShardError, match="only whole numbers of pixels and blank"):
            pixels(pd.Series([text], name="Rows"), "t")


def test_blank_ids_are_named_by_their_lines():
    column = pd.Series(["a", None, "", "  ", "\t", "0", "None"], range(2, 9), dtype=object, name="patient_id")
    with pytest.raises(ShardError, match=r"t.csv: patient_id is blank in lines 3, 4, 5, 6: give every image one"):
        filled(column, "t.csv")
    assert filled(column.iloc[[0, 5, 6]], "t.csv").tolist() == ["a", "0", "None"]
    assert lines(pd.Index([7])) == "line 7"
    assert lines(pd.RangeIndex(2000)) == "lines 0, 1, 2, 3, 4, … (2,000)"


@pytest.mark.parametrize(
    ("texts", "values", "note"),
    [
        (["Yes", "No", "", None], [1, 0, np.nan, np.nan], "labels read from words, No as 0, Yes as 1: Mass"),
        ([" yes ", "NO", "n/a"], [1, 0, np.nan], "labels read from words, NO as 0, yes as 1: Mass"),
        (["positive", "Negative", "negative"], [1, 0, 0], "Negative as 0, negative as 0, positive as 1: Mass"),
        (["Y", "N"], [1, 0], "N as 0, Y as 1: Mass"),
        (["True", "False", ""], [1, 0, np.nan], "False as 0, True as 1: Mass"),
        (["0.0", "1.0", "-1.0", "1", ""], [0, 1, -1, 1, np.nan], None),
        (["", None], [np.nan, np.nan], None),
    ],
)
def test_words_are_labels_where_a_column_holds_nothing_else_and_the_user_is_told(texts, values, note):
    column = pd.Series(texts, dtype=object, name="Mass")
    np.testing.assert_array_equal(raw_labels(column, "t"), np.float32(values))
    notes = notes_on_words(pd.DataFrame({"Mass": column, "Edema": ["1", *[""] * (len(texts) - 1)]}))
    assert notes == () if note is None else notes[0].endswith(note)


@pytest.mark.parametrize("texts", [["yes", "1"], ["yes", "negative"], ["positive", "uncertain"], ["present", "-1"]])
def test_words_next_to_anything_else_are_refused_with_their_lines(texts):
    with pytest.raises(ShardError, match=rf"holds '({'|'.join(texts)})' for Mass in line 2: only 1, 0, -1 and blank"):
        raw_labels(pd.Series([texts[0], "", texts[1]], range(2, 5), dtype=object, name="Mass"), "t")
