"""Predictions on another set: what is stored comes back, and what does not belong together is refused."""

import shutil

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from others import OTHER_LABELS, other_rows, predict_other
from runs import LABELS, make_run, make_untrained

from cxrfast.errors import RunError
from cxrfast.models.classifier import Classifier
from cxrfast.runs.external import Matching, check_free, check_name, known_names, names, read_external
from cxrfast.runs.run import Run


@pytest.fixture
def run(tmp_path) -> Run:
    return make_run(tmp_path / "runs", 256)


def test_what_was_written_is_read(run):
    written = predict_other(run, views=("AP",), is_partial=True, recipe="resize pad, not squash")
    read = read_external(run, "hospital-b")
    assert read.other == written.other
    pd.testing.assert_frame_equal(read.rows, other_rows(), check_dtype=False)
    np.testing.assert_array_equal(read.logits, written.logits)
    np.testing.assert_array_equal(read.copy_of, written.copy_of)
    assert list(read_external(run, "hospital-b", ids=False).rows) == ["row", *OTHER_LABELS]


def test_names_are_listed_with_the_number_of_runs(run, tmp_path):
    other = make_run(tmp_path / "runs", 512)
    assert known_names([run, other]) == ""
    for one in (run, other):
        predict_other(one)
    predict_other(run, "a")
    assert names(run) == ["a", "hospital-b"]
    assert known_names([run, other]) == "a (1 run), hospital-b (2 runs)"


@pytest.mark.parametrize(
    "name",
    [
        "",
        " ",
        ".",
        "..",
        "a/b",
        "../x",
        ".hidden",
        "-on",
        "a\nb",
        "a\x1b[31m",
        "=1+1",
        "x ",
        "x" * 101,
        "é" * 51,
        "val",
        "Test",
    ],
)
def test_a_name_that_is_not_one_of_a_file_is_refused(name):
    with pytest.raises(RunError, match="give another name for the set"):
        check_name(name)


@pytest.mark.parametrize("name", ["hospital-b", "Klinik Süd", "2024", "a.b", "x" * 100])
def test_other_names_are_taken(run, name):
    check_name(name)
    predict_other(run, name)
    assert read_external(run, name).other.name == name


def test_a_name_is_taken_by_one_set(run, tmp_path):
    predict_other(run)
    check_free(run, "hospital-b", "b" * 32, tmp_path)
    with pytest.raises(RunError, match=f"another set named hospital-b .*set {'b' * 32}; .* is set {'c' * 32}.*--on"):
        check_free(run, "hospital-b", "c" * 32, tmp_path)
    (run.external_path / "hospital-b.parquet").write_bytes(b"nothing")
    with pytest.raises(RunError, match="another set named hospital-b"):
        check_free(run, "hospital-b", "c" * 32, tmp_path)
    shutil.rmtree(run.external_path / "hospital-b.zarr")
    check_free(run, "hospital-b", "c" * 32, tmp_path)


def test_predictions_are_not_written_through_a_link(run, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    run.external_path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="is a link"):
        predict_other(run)
    assert not list((tmp_path / "elsewhere").iterdir())


def described(path, **changes) -> None:
    """Change the description in a table."""
    import json

    table = pq.read_table(path)
    value = json.loads(table.schema.metadata[b"cxrfast"]) | changes
    pq.write_table(table.replace_schema_metadata({b"cxrfast": json.dumps(value).encode()}), path)


def lose_chunk(folder) -> None:
    shutil.rmtree(folder / "logits" / "c")


DAMAGE = {
    "the table is cut short": lambda f: (f / "b.parquet").write_bytes((f / "b.parquet").read_bytes()[:-100]),
    "the table is empty": lambda f: (f / "b.parquet").write_bytes(b""),
    "the table lacks its description": lambda f: pq.write_table(
        pq.read_table(f / "b.parquet").replace_schema_metadata(None), f / "b.parquet"
    ),
    "the description is a list": lambda f: pq.write_table(
        pq.read_table(f / "b.parquet").replace_schema_metadata({b"cxrfast": b"[]"}), f / "b.parquet"
    ),
    "the description has a field of another kind": lambda f: described(f / "b.parquet", labels=3),
    "the table is of another run": lambda f: described(f / "b.parquet", config_hash="0" * 16),
    "the table has another name": lambda f: described(f / "b.parquet", name="c"),
    "a label is absent": lambda f: described(f / "b.parquet", labels=["Edema", "Other"]),
    "a label is text": lambda f: described(f / "b.parquet", labels=["image_id"]),
    "the logits are of another set": lambda f: described(f / "b.parquet", set_id="c" * 32),
    "the rows are others": lambda f: pq.write_table(pq.read_table(f / "b.parquet").slice(1), f / "b.parquet"),
    "the rows do not ascend": lambda f: pq.write_table(
        pq.read_table(f / "b.parquet").take(pa.array(range(119, -1, -1))), f / "b.parquet"
    ),
    "a chunk is lost": lambda f: lose_chunk(f / "b.zarr"),
    "the store's metadata is damaged": lambda f: (f / "b.zarr" / "zarr.json").write_text("{"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_predictions_are_refused_and_can_be_made_again(run, damage):
    predict_other(run, "b")
    damage(run.external_path)
    with pytest.raises(RunError, match=r"again|make it again"):
        read_external(run, "b")
    written = predict_other(run, "b")
    np.testing.assert_array_equal(read_external(run, "b").logits, written.logits)


def test_predictions_killed_between_their_two_files_are_not_listed_or_are_the_earlier_ones(run):
    predict_other(run, "b")
    shutil.rmtree(run.external_path / "b.zarr")
    assert names(run) == []
    with pytest.raises(RunError, match=r"has no predictions on 'b' .* `cxrfast predict .* SET --on b`"):
        read_external(run, "b")


def test_new_weights_delete_predictions_on_other_sets(tiny_set, tmp_path):
    run = make_untrained(tmp_path, tiny_set, ["train", "val", "test"])
    predict_other(run)
    run.write_weights(Classifier(run.config.arch, len(run.config.labels)).state_dict())
    assert names(run) == []
    assert not run.external_path.exists()


def test_findings_are_matched_by_their_exact_names_in_the_order_of_the_run():
    found = Matching.of(LABELS, ["Pneumonia", "edema", "Edema ", "Lung  Lesion", "Airspace Opacity", "Fracture"])
    assert found.both == ("Fracture", "Pneumonia")
    assert found.only_run == ("Edema", "Lung Lesion")
    assert found.only_set == ("edema", "Edema ", "Lung  Lesion", "Airspace Opacity")
    assert [text.partition(",")[0] for text in found.near_misses()] == [
        "'Edema' of the runs is not matched",
        "'Lung Lesion' of the runs is not matched",
    ]
    assert Matching.of(["Lung Opacity"], ["Airspace Opacity"]).near_misses() == [
        "'Lung Opacity' of the runs is not matched, did you mean 'Airspace Opacity'?"
    ]
    assert Matching.of(["Edema"], ["Pneumonia"]).near_misses() == []
