import unicodedata

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxrfast.errors import ShardError
from cxrfast.shards.sources.ids import check_distinct, check_join, is_too_few, normal_id, normal_ids


def column(*texts: str | None) -> pd.Series:
    """A column of a table, from line 2 on."""
    return pd.Series(texts, range(2, 2 + len(texts)), dtype=object, name="patient_id")


ENDS = ["", " ", "\t", "\u00a0", "\u2009", "\u200b", "\ufeff", "\u00a0 \ufeff"]


@given(
    text=st.text("aZ0189-_./é ü", min_size=1).filter(lambda t: normal_id(t) == unicodedata.normalize("NFC", t)),
    before=st.sampled_from(ENDS),
    after=st.sampled_from(ENDS),
    form=st.sampled_from(["NFC", "NFD"]),
)
def test_an_id_is_the_same_whatever_stands_at_its_ends_and_in_either_unicode_form(text, before, after, form):
    assert normal_id(before + unicodedata.normalize(form, text) + after) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("1001.0", "1001"),
        ("1001.000", "1001"),
        (" 1001.0 ", "1001"),
        ("0001", "0001"),
        ("0001.0", "0001"),
        ("1001.5", "1001.5"),
        ("1.2.840.10008.0", "1.2.840.10008.0"),
        ("p1.0", "p1.0"),
        ("12345e67", "12345e67"),  # a hash
        ("1e5", "1e5"),
    ],
)
def test_whole_floats_lose_their_point_and_nothing_else_changes(text, normal):
    assert normal_ids(column(text), "t.csv").tolist() == [normal]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "t.csv: patient_id is blank in line 3: give every image one"),
        ("  ", "is blank in line 3: give"),
        ("\u00a0\ufeff", "is blank in line 3"),
        ("nan", r"is blank in line 3 \('nan'\)"),
        ("None", r"is blank in line 3 \('None'\)"),
        ("NA", "is blank in line 3"),
        ("<NA>", "is blank in line 3"),
        ("#N/A", "is blank in line 3"),
        (
            "8.39860488694292E+35",
            r"was rounded by a spreadsheet in line 3 \('8.39860488694292E\+35'\): export .* as text",
        ),
        ("8,39860488694292E+35", "was rounded by a spreadsheet in line 3"),
        ("1e+05", "was rounded by a spreadsheet"),
        ("1.5e7", "was rounded by a spreadsheet"),
        ("1234567890123456.0", "is a floating-point number, which cannot hold all its digits, in line 3"),
        ("\ufeff1234567890123456.0", "is a floating-point number, which cannot hold all its digits, in line 3"),
    ],
)
def test_what_is_not_an_id_is_refused_with_its_line(text, message):
    with pytest.raises(ShardError, match=message):
        normal_ids(column("a", text, "b"), "t.csv")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1", "00001"),
        ("p7", "p007"),
        ("1_1", "1_01"),
        ("a b", "a  b"),
        ("a b", "a\u00a0b"),
        ("\uff11\uff12", "12"),
    ],  # full-width digits
)
def test_ids_that_only_a_form_distinguishes_are_refused_with_their_lines(one, other):
    with pytest.raises(ShardError, match=r"may be the same: .* in line 2; .* in lines 3, 5: write each id in one way"):
        check_distinct(normal_ids(column(one, other, "c", other), "t"), "t")


@given(
    st.lists(st.integers(1, 10**6), min_size=1, max_size=50), st.sampled_from(["{}", "{:08d}", "p{}", "patient{:05d}"])
)
def test_ids_of_one_width_or_none_are_distinct(numbers, form):
    check_distinct(column(*map(form.format, numbers)), "t")


def test_hexadecimal_ids_of_one_length_are_distinct():
    rng = np.random.default_rng(0)
    ids = [f"{n:08x}" for n in rng.integers(0, 2**32, 100_000)]
    check_distinct(normal_ids(column(*ids), "t"), "t")


@given(mine=st.sets(st.integers(0, 300), min_size=1), theirs=st.sets(st.integers(0, 300), min_size=1))
def test_a_join_is_refused_unless_99_percent_of_either_side_are_found_or_all_but_one(mine, theirs):
    sides = [pd.Series([str(n) for n in sorted(side)]) for side in (mine, theirs)]
    both = len(mine & theirs)
    names = {"images": "the set", "table": "t.csv", "what": "studies"}
    fits = both > 0 and all(len(side) - both <= max(1, len(side) // 100) for side in (mine, theirs))
    assert fits is not (is_too_few(both, len(mine)) or is_too_few(both, len(theirs)))
    check_join(*sides, allowed=True, **names)
    if fits:
        check_join(*sides, allowed=False, **names)
    else:
        with pytest.raises(ShardError, match="--allow-unmatched") as error:
            check_join(*sides, allowed=False, **names)
        for alone, whole, here in ((mine - theirs, mine, "the set"), (theirs - mine, theirs, "t.csv")):
            assert (f"{len(alone)} of the {len(whole)} studies in {here} are not in" in str(error.value)) is bool(alone)
