"""The films that paths, folders and patterns name: all of them, once, in a fixed order."""

import os
from pathlib import Path

import pytest
from dicoms import radiograph, shapes, written
from hypothesis import given
from hypothesis import strategies as st
from pictures import saved, smooth
from PIL import Image

from cxrfast.errors import RunError
from cxrfast.inference.listing import list_films, natural, natural_key

JPEG = saved(Image.fromarray(smooth(16, 16)))
PNG = saved(Image.fromarray(smooth(16, 16)), "PNG")
DICOM = written(radiograph(shapes(16, 16)))


def names(*given: object) -> list[str]:
    return [film.name for film in list_films([str(name) for name in given])]


def problems(*given: object) -> dict[str, str]:
    return {Path(film.name).name: film.problem for film in list_films([str(name) for name in given])}


@pytest.fixture
def tree(tmp_path):
    """A folder with films at three levels, and other files."""
    for path, data in {
        "film-10.jpg": JPEG,
        "film-2.jpg": JPEG,
        "film-1.PNG": PNG,
        "a/1.2.840.113619.850819": DICOM,
        "a/IM000001": DICOM,
        "a/b/photo": JPEG,
        "a/b/scan.tif": b"II*\0",
        "notes.txt": b"text",
        "table.csv": b"film,label\n",
        "a/DICOMDIR": DICOM,
        ".hidden.jpg": JPEG,
        ".cache/film.jpg": JPEG,
        "empty": b"",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(data)
    return tmp_path


def test_a_folder_stands_for_its_films_at_all_levels_in_natural_order(tree):
    assert [str(Path(name).relative_to(tree)) for name in names(tree)] == [
        "a/1.2.840.113619.850819",
        "a/IM000001",
        "a/b/photo",
        "a/b/scan.tif",
        "film-1.PNG",
        "film-2.jpg",
        "film-10.jpg",
    ]


def test_names_are_as_the_user_gave_them(tree, monkeypatch):
    monkeypatch.chdir(tree)
    assert names("film-2.jpg", "./a/b") == ["film-2.jpg", "./a/b/photo", "./a/b/scan.tif"]
    assert names("notes.txt") == ["notes.txt"], "a file that is named is a film, whatever it holds"


def test_a_quoted_pattern_is_expanded(tree, monkeypatch):
    monkeypatch.chdir(tree)
    assert names("film-*.jpg") == ["film-2.jpg", "film-10.jpg"]
    assert names("**/IM*") == ["a/IM000001"]
    (tree / "odd[1].jpg").write_bytes(JPEG)
    assert names("odd[1].jpg") == ["odd[1].jpg"], "a file whose name looks like a pattern is that file"


def test_a_film_named_twice_counts_once_also_by_a_link(tree):
    (tree / "again.jpg").symlink_to(tree / "film-2.jpg")
    (tree / "link").symlink_to(tree / "a")
    found = names(tree / "film-2.jpg", tree, tree / "film-*.jpg")
    assert found[0] == str(tree / "film-2.jpg")
    assert len(found) == 7
    assert len({os.path.realpath(name) for name in found}) == 7


def test_a_broken_link_that_comes_first_hides_no_other_film(tmp_path):
    (tmp_path / "a.jpg").symlink_to(tmp_path / "gone.jpg")
    (tmp_path / "b.jpg").write_bytes(JPEG)
    assert problems(tmp_path) == {"a.jpg": "missing", "b.jpg": ""}
    assert problems(tmp_path / "a.jpg") == {"a.jpg": "missing"}, "it is there, and is a line with a reason"


def test_what_cannot_be_read_becomes_a_line_with_a_reason(tree):
    os.mkfifo(tree / "pipe")
    (tree / "broken.jpg").symlink_to(tree / "gone.jpg")
    (tree / "self").symlink_to(tree / "self")
    (tree / "a" / "up").symlink_to(tree)
    found = problems(tree)
    assert found.pop("pipe") == "not a file: a pipe, a socket or a device"
    assert found.pop("broken.jpg") == "missing"
    assert found.pop("self") == "unreadable: a link that leads to itself"
    assert found.pop("up") == "a link that leads back to a folder above it"
    assert len(found) == 7
    assert set(found.values()) == {""}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_a_line(tree):
    (tree / "a").chmod(0)
    try:
        assert problems(tree)["a"] == "unreadable: Permission denied"
    finally:
        (tree / "a").chmod(0o755)


def test_nothing_to_predict_is_one_message(tree):
    (tree / "bare").mkdir()
    for name, why in (
        ("bare", r"there are no films in .*bare: no JPEG, PNG or DICOM file"),
        ("*.dcm", r"no file matches .*\*\.dcm"),
        ("gone.png", r"gone\.png is not a run, a shard set or a film: there is no such file"),
    ):
        with pytest.raises(RunError, match=why):
            list_films([str(tree / name)])


def test_sizes_and_times_are_those_of_the_files(tree):
    (film,) = list_films([str(tree / "film-2.jpg")])
    status = (tree / "film-2.jpg").stat()
    assert (film.bytes, film.modified) == (status.st_size, status.st_mtime_ns)


@given(st.lists(st.text("a1 0b/.", max_size=6)))
def test_natural_order_is_the_same_whatever_the_order_before(those):
    assert natural(those) == natural(those[::-1])
    assert sorted(those) == sorted(natural(those))


def test_numbers_count_by_their_value():
    assert natural(["x10", "x9", "x010", "y1", "x"]) == ["x", "x9", "x010", "x10", "y1"]
    assert natural_key("a2") < natural_key("a10")
