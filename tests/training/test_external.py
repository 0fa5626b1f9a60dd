"""Runs on another set than their own: the right logits, and every reason to doubt them said."""

import json
import os
import shutil
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from commands import invoke
from commands import run as start
from damage import copy_set
from others import build_other
from runs import make_untrained
from sets import build

from cxrfast.distributed import World
from cxrfast.errors import CxrfastError, RunError
from cxrfast.pipelines.reader import Reader
from cxrfast.runs.external import names, read_external
from cxrfast.runs.lease import InUse, locked
from cxrfast.runs.run import Run
from cxrfast.shards.format.recipe import ImageRecipe
from cxrfast.shards.format.rows import read_rows
from cxrfast.shards.images.jpeg import decode_grey
from cxrfast.training.external import predict_external, recipe_differences

CPU = World(torch.device("cpu"))


@pytest.fixture(scope="module")
def other(tmp_path_factory, tiny_set):
    """Six images; three labels, one of which the runs have, and one that they almost have; a patient of the tiny set."""
    known = read_rows(tiny_set / "rows.parquet")["patient_id"].iloc[0]
    labels = {"Edema": [1, 0, 1, 0, 1, 0], "pneumonia": [1, 0, 1, 0, 1, 0], "Mass": [0, 0, 1, -1, 1, 0]}
    return build_other(tmp_path_factory.mktemp("other"), [known, known, "b1", "b2", "b3", "b4"], **labels)


@pytest.fixture
def runs(tiny_set, tmp_path):
    """Two runs at 32 px whose first row trains, second validates, third tests."""
    return [make_untrained(tmp_path / "runs", tiny_set, ["train", "val", "test"], 32, fold) for fold in (0, 1)]


@pytest.fixture
def run(trained, tmp_path) -> Run:
    """A copy of a trained run at 32 px, whose logits differ from image to image."""
    shutil.copytree(trained.folder, tmp_path / "study" / "densenet121-32" / "fold-0")
    return Run.open(tmp_path / "study" / "densenet121-32" / "fold-0")


def messages(caplog) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)


def test_every_row_gets_the_logits_of_its_own_image_and_the_table_needs_no_set(run, other):
    assert predict_external([run], CPU, other) == "hospital-b"
    reader, table = Reader(other, 32), read_rows(other / "rows.parquet")
    external = read_external(run, "hospital-b")
    assert external.rows["row"].tolist() == list(range(6))
    for column in ("image_id", "study_id", "patient_id", "Edema", "pneumonia", "Mass"):
        np.testing.assert_array_equal(external.rows[column], table[column])
    model = run.load()
    images = np.stack([decode_grey(bytes(reader.read(row))) for row in range(6)])
    with torch.inference_mode():
        alone = torch.cat([model(torch.from_numpy(image)[None, None]) for image in images]).numpy()
    np.testing.assert_allclose(external.logits, alone, rtol=1e-3, atol=1e-4)
    assert external.logits.std(axis=0).max() > 1e-4, "logits that do not differ would pass whatever the order"
    assert external.other.set_id == reader.info.id


def test_findings_near_misses_and_shared_patients_are_said_once_each_and_no_id_is(runs, other, caplog):
    known = read_rows(other / "rows.parquet")["patient_id"].mode()[0]
    with caplog.at_level("INFO", "cxrfast"):
        predict_external(runs, CPU, other)
    text = messages(caplog)
    assert (
        text.count("hospital-b has labels of 1 of the 14 findings of the runs: Edema; only in the runs: Atelectasis")
        == 1
    )
    assert text.count("only in hospital-b: pneumonia, Mass") == 1
    assert text.count("'Pneumonia' of the runs is not matched, did you mean 'pneumonia'?") == 1
    assert "densenet" not in text
    for run in runs:
        assert f"{run.name}: In common with the runs' own rows: patients: train 1 (2 rows of hospital-b), val 0" in text
    assert known not in text


def test_images_that_are_the_same_files_are_counted_even_under_other_ids(tiny_set, phantoms, tmp_path, caplog):
    """The other set holds copies of two phantoms, one of which is a training image."""
    rows = read_rows(tiny_set / "rows.parquet")
    tree = tmp_path / "tree"
    tree.mkdir()
    for n, row in enumerate((0, 50)):
        shutil.copy(phantoms / rows["path"][row], tree / f"copy{n}.jpg")
    pd.DataFrame({"path": ["copy0.jpg", "copy1.jpg"], "patient_id": ["x", "y"], "Edema": [1, 0]}).to_csv(
        tree / "t.csv", index=False
    )
    build(tree, tmp_path / "copies", [32], source="table", source_options={"table": "t.csv", "label": ["Edema"]})
    run = make_untrained(tmp_path / "runs", tiny_set, ["train", "val", "test"], 32)
    predict_external([run], CPU, tmp_path / "copies")
    external = read_external(run, "copies")
    by_image = dict(zip(external.rows["image_id"], external.copy_of.tolist(), strict=True))
    assert by_image == {"copy0": 0, "copy1": 50}
    assert "images: train 1, val 0, test 0." in messages(caplog)


def test_the_default_name_is_that_of_the_folder_and_a_name_belongs_to_one_set(runs, other, raw_set, tiny_set, tmp_path):
    predict_external(runs, CPU, other)
    second = tmp_path / "second" / "hospital-b"
    shutil.copytree(raw_set, second)
    before = read_external(runs[0], "hospital-b").logits
    with pytest.raises(RunError, match="another set named hospital-b"):
        predict_external(runs, CPU, second)
    np.testing.assert_array_equal(read_external(runs[0], "hospital-b").logits, before)
    assert predict_external(runs, CPU, second, name="raw") == "raw"
    assert names(runs[0]) == ["hospital-b", "raw"]
    predict_external(runs, CPU, other)  # the same set again


def test_only_the_views_that_were_asked_for_are_scored(runs, tiny_set, raw_set):
    rows = read_rows(raw_set / "rows.parquet")
    view = rows["view"].value_counts().index[0]
    predict_external(runs[:1], CPU, raw_set, name="one", views=[view])
    external = read_external(runs[0], "one")
    assert external.rows["row"].tolist() == rows.index[rows["view"] == view].tolist()
    assert external.other.views == (view,)
    with pytest.raises(RunError, match="--view 'XX': no image of the set has this view position"):
        predict_external(runs[:1], CPU, raw_set, name="two", views=["XX"])


def test_a_set_that_lacks_the_scale_is_refused_with_the_command(tiny_set, other, tmp_path):
    run = make_untrained(tmp_path / "runs", tiny_set, ["train", "val", "test"], 64)
    with pytest.raises(
        CxrfastError, match=r"holds no shards at 64 px \(scales there: 32\): .*`cxrfast shard --scale 64`"
    ):
        predict_external([run], CPU, other)


def test_an_unfinished_set_is_refused_unless_it_is_allowed(runs, raw_set, tmp_path):
    partial = copy_set(raw_set, tmp_path / "part")
    (partial / "32" / "000001.json").unlink()
    with pytest.raises(
        RunError, match=r"since its build is not finished.* or predict the rows that are there with --allow-partial"
    ):
        predict_external(runs, CPU, partial)
    assert names(runs[0]) == []
    predict_external(runs, CPU, partial, allow_partial=True)
    external = read_external(runs[0], "part")
    assert external.other.is_partial
    assert external.rows["row"].tolist() == Reader(partial, 32).rows.tolist()
    assert len(external.rows) < 150


def test_images_that_were_made_otherwise_are_warned_of(runs, raw_set, caplog):
    predict_external(runs[:1], CPU, raw_set, name="raw")
    assert (
        "images of raw were made otherwise than those the runs were trained on: codec raw, not jpeg; quality none, not 95; "
        "dct none, not accurate"
    ) in messages(caplog)
    assert recipe_differences(ImageRecipe(seed=1), ImageRecipe()) == ""
    assert recipe_differences(ImageRecipe(resize="pad", grey="mimic"), ImageRecipe()) == (
        "resize pad, not squash; grey mimic, not none"
    )


def test_runs_whose_own_set_is_gone_are_predicted_and_the_comparison_that_is_missing_is_said(
    runs, other, caplog, tiny_set
):
    stored = json.loads(runs[0].config_path.read_bytes())
    runs[0].config_path.write_text(json.dumps(stored | {"shards": "/nowhere"}))
    run = Run.open(runs[0].folder)
    predict_external([run], CPU, other)
    assert (
        "/nowhere is not the set that mobilenet_v3_small-32/fold-0 was trained on, or not there any more"
        in messages(caplog)
    )
    assert not read_external(run, "hospital-b").other.knows_files
    caplog.clear()
    predict_external([run], CPU, other, own=tiny_set)
    assert "/nowhere" not in messages(caplog)
    assert read_external(run, "hospital-b").other.knows_files
    with pytest.raises(RunError, match="give the folder of its own set with --shards"):
        predict_external([run], CPU, other, own=other)


def test_another_process_that_writes_into_the_run_is_not_disturbed(runs, other):
    with locked(runs[1], "training"), pytest.raises(InUse, match="is in use"):
        predict_external(runs, CPU, other)
    assert names(runs[0]) == ["hospital-b"], "the run before is finished"
    assert names(runs[1]) == []


def test_a_run_that_is_interrupted_while_it_writes_keeps_what_it_had_or_says_that_it_has_nothing(
    runs, other, monkeypatch
):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cxrfast.runs.external.write_arrays", stop)
    with pytest.raises(KeyboardInterrupt):
        predict_external(runs[:1], CPU, other)
    assert names(runs[0]) == []
    monkeypatch.undo()
    predict_external(runs[:1], CPU, other)
    before = read_external(runs[0], "hospital-b").logits
    monkeypatch.setattr("cxrfast.runs.external.write_arrays", stop)
    with pytest.raises(KeyboardInterrupt):
        predict_external(runs[:1], CPU, other)
    np.testing.assert_array_equal(read_external(runs[0], "hospital-b").logits, before)


def test_logits_that_were_damaged_in_the_set_stop_the_run_and_write_nothing(runs, other, tmp_path):
    damaged = copy_set(other, tmp_path / "damaged")
    tar = damaged / "32" / "000000.tar"
    data = bytearray(tar.read_bytes())
    data[700] ^= 255
    tar.write_bytes(data)
    with pytest.raises(CxrfastError, match="row"):
        predict_external(runs, CPU, damaged)
    assert names(runs[0]) == []


def test_the_command_sorts_its_own_set_from_another(runs, other, tiny_set):
    folder = runs[0].folder
    done = invoke("predict", folder, tiny_set, other, "--device=cpu")
    assert done.exit_code == 0, done.output
    assert Run.open(folder).has_predictions
    assert names(runs[0]) == ["hospital-b"]
    assert f"next: cxrfast evaluate {folder.parents[1]} --on hospital-b" in done.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--on=x"], "give its folder, too"),
        (["--view=PA"], "give its folder, too"),
        (["--allow-partial"], "give its folder, too"),
        (["{tiny}", "--on=x"], "give its folder, too"),
        (["{other}", "{raw}", "--on=x"], "--on x with 2 sets"),
        (["{other}", "--on=a/b"], "holds a slash"),
        (["{other}", "--on=test"], "is the name of a part"),
    ],
)
def test_options_that_do_not_fit_are_refused(runs, other, tiny_set, raw_set, words, message):
    given = [word.format(tiny=tiny_set, other=other, raw=raw_set) for word in words]
    done = invoke("predict", runs[0].folder, *given, "--device=cpu")
    assert done.exit_code == 2
    assert message in done.output
    assert names(runs[0]) == []


def test_two_ranks_store_what_one_process_stores(run, raw_set):
    predict_external([run], CPU, raw_set, name="one")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "-m", "cxrfast"]
    done = start(*torchrun, "predict", run.folder, raw_set, "--on=two", "--device=cpu", timeout=300)
    assert done.returncode == 0, done.stderr
    one, two = (read_external(run, name) for name in ("one", "two"))
    pd.testing.assert_frame_equal(one.rows, two.rows)
    assert one.logits.std(axis=0).max() > 1e-4
    np.testing.assert_allclose(one.logits, two.logits, rtol=1e-4, atol=1e-5)
    assert done.stdout.count("next: cxrfast evaluate") == 1
    assert os.listdir(run.external_path).count("two.zarr") == 1
