import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxrfast.errors import ShardError
from cxrfast.shards.building.layout import assign_rows
from cxrfast.shards.format.rows import RESERVED, read_rows, write_rows
from cxrfast.shards.sources.source import IDS, Source, checked
from cxrfast.shards.storage import Tree

TREE = Tree("/data")


def images(n: int = 6) -> pd.DataFrame:
    numbers = range(n)
    return pd.DataFrame(
        {
            "age": 60,
            "Mass": [1, 0, -1, None, True, False][:n],
            "path": [f"a/{i}.png" for i in numbers],
            "radiologist/Mass": [np.nan, 1.0, 0.0, -1.0, np.nan, np.nan][:n],
            "split": ["train", "validate", "test", None, np.nan, ""][:n],
            "patient_id": ["007", "007", "8", "8", "9", "9"][:n],
            "study_id": ["s1", "s1", "s2", "s3", "s4", "s5"][:n],
            "height": [3056, 0, None, np.nan, 10, 20][:n],
            "width": [2544.0, 0, np.nan, np.nan, 10, 20][:n],
            "view": ["AP", None, "", " ", "LL", np.nan][:n],
            "image_id": [f"i{i}" for i in numbers],
            "Edema": np.nan,
        },
        index=range(2, n + 2),
    )


def check(frame: pd.DataFrame, labels: tuple[str, ...] = ("Mass", "Edema")) -> Source:
    return checked(Source(images=frame, labels=labels, counts={"odd ones": 3}), TREE)


def test_what_passes_is_complete_in_order_and_in_its_types():
    before = images()
    source = check(before)
    frame = source.images
    assert list(frame.columns) == [*IDS, "view", "height", "width", "split", "Mass", "Edema", "radiologist/Mass"]
    assert frame.index.tolist() == list(range(6))
    assert (source.labels, source.counts) == (("Mass", "Edema"), {"odd ones": 3})
    np.testing.assert_array_equal(frame["Mass"], np.float32([1, 0, -1, np.nan, 1, 0]))
    assert frame[["Mass", "Edema", "radiologist/Mass"]].dtypes.eq(np.float32).all()
    assert frame["view"].isna().tolist() == [False, True, True, True, False, True]
    assert frame["split"].isna().tolist() == [False, False, False, True, True, True]
    pd.testing.assert_frame_equal(before, images(), check_exact=True)
    pd.testing.assert_frame_equal(check(frame).images, frame)


def test_columns_of_pandas_own_text_are_read_as_text():
    before = images()
    plain = check(before).images
    text = [*IDS, "view", "split"]
    found = check(before.astype(dict.fromkeys(text, "string"))).images
    pd.testing.assert_frame_equal(found[text].astype(object), plain[text].astype(object))


def test_what_passes_can_be_planned_and_written(tmp_path):
    source = check(images())
    rows = assign_rows(source.images, source.labels, 0)
    write_rows(tmp_path / "rows.parquet", rows)
    back = read_rows(tmp_path / "rows.parquet").set_index("image_id")
    assert back["patient_id"].sort_index().tolist() == ["007", "007", "8", "8", "9", "9"]
    assert back["height"].sort_index().tolist() == [3056, 0, 0, 0, 10, 20]
    np.testing.assert_array_equal(back["radiologist/Mass"].sort_index(), source.images["radiologist/Mass"])


@pytest.mark.parametrize("column", IDS)
def test_an_id_that_is_missing_blank_or_not_one_line_is_refused(column):
    values = dict.fromkeys((None, np.nan, "", "  "), f"list 1 images without {column}: give every image one")
    for value in ("a\tb", "a\nb", "a\rb", "\0", "a\x1b[31m", "a\u202eb", "a\u2028b"):
        code = next(f"{ord(c):04X}" for c in value if not c.isprintable())
        values[value] = rf"list the {column} '.*' holds the character U\+{code}.*: rename it"
    values["a" * 5000] = rf"list the {column} 'a{{60}}'… has 5,000 (characters|bytes), and at most [0-9,]+ are allowed"
    for value, message in values.items():
        frame = images()
        frame[column] = frame[column].astype(object)
        frame.loc[3, column] = value
        with pytest.raises(ShardError, match=message):
            check(frame)
    with pytest.raises(ShardError, match=rf"the tables in /data were listed without the columns {column}:"):
        check(images().drop(columns=column))
    with pytest.raises(ShardError, match="the tables in /data list no images"):
        check(images().iloc[:0])


@pytest.mark.parametrize(
    "values", [[1, 2, 3, 4, 5, 6], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [b"a", b"b", b"c", b"d", b"e", b"f"]]
)
def test_ids_that_are_no_text_are_refused_since_they_may_have_lost_zeros(values):
    with pytest.raises(ShardError, match="for patient_id: it must be text, exactly as it is written"):
        check(images().assign(patient_id=values, study_id=list("abcdef")))


@settings(max_examples=20)
@given(
    st.lists(st.sampled_from(["a", "..a", "a..", "...", ".a", "ä b", "C:", "[x]*?"]), min_size=1, max_size=4).map(
        "/".join
    )
)
def test_a_path_that_is_below_the_tree_passes(path):
    frame = images()
    frame.loc[3, "path"] = path
    assert check(frame).images["path"][1] == path


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (("",), "listed with the labels .*: name their columns"),
        ((3,), "listed with the labels .*: name their columns"),
        (("Mass", "Mass"), "label 'Mass' is named twice"),
        (("Mass", "Nodule"), "were listed without the columns Nodule"),
        (("Mass", "radiologist/Mass"), "a label cannot be called 'radiologist/Mass'"),
        *(
            (("Mass", f"Mass{bad}"), r"the label 'Mass.*' holds the character U\+")
            for bad in ("\n", "\0", "\x1b[1m", "\u200b")
        ),
        (("Mass", "Mass "), "the label 'Mass ' starts or ends with a blank: rename its column"),
        (("Mass", "M" * 201), "the label 'M{60}'… has 201 characters, and at most 200 are allowed"),
        (("Mass", "=cmd|'/C calc'!A0"), "would be run as a formula by a spreadsheet"),
        *((("Mass", name), f"a label cannot be called '{name}'") for name in sorted(RESERVED)),
    ],
)
def test_names_that_cannot_be_labels_are_refused(labels, message):
    with pytest.raises(ShardError, match=message):
        check(images(), labels)


UNTIDY = ("/a.png", "../a.png", "a/../b.png", "a/..", "./a.png", "a//b.png", "a/", "s3://x/y.png", ".", "a/./b")


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("image_id", "i3", "list image i3 twice"),
        ("path", "a/3.png", "list the file a/3.png twice"),
        ("study_id", "s2", "give study s2 to the patients 007 and 8: a study belongs to one patient"),
        ("split", "valid", "hold the split 'valid': use train, validate, test or null"),
        ("height", -1, "hold the height -1: it must be whole pixels"),
        ("width", 2.5, "hold the width 2.5: it must be whole pixels"),
        ("height", 2.0**31, "it must be whole pixels"),
        ("height", "tall", "hold a height that is not a number"),
        ("view", 3, "with .* for view: it must be text"),
        *(("path", path, "paths must be relative to the tree, without") for path in UNTIDY),
        *(
            (column, value, f"hold .*{value}.* for {column}: only 1, 0, -1 and blank are known")
            for column in ("Mass", "radiologist/Mass")
            for value in (2, 0.5, "1", "yes", np.inf)
        ),
    ],
)
def test_a_value_that_means_nothing_or_contradicts_another_line_is_refused(column, value, message):
    frame = images()
    frame[column] = frame[column].astype(object)
    frame.loc[3, column] = value
    with pytest.raises(ShardError, match=message):
        check(frame)
