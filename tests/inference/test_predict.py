"""`cxrfast predict RUNS FILMS`: one line per film, resumable, and no file of others is ever replaced."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from commands import invoke
from dicoms import radiograph, shapes, written

from cxrfast.errors import RunError
from cxrfast.inference import predict as module
from cxrfast.inference.ensemble import Member, ScaleEnsemble
from cxrfast.inference.predict import predict_films
from cxrfast.models.classifier import Classifier
from cxrfast.runs.run import Run
from cxrfast.shards.format.recipe import ImageRecipe


@pytest.fixture(scope="module")
def ensemble(study):
    return ScaleEnsemble.from_runs(Run.find(study))


@pytest.fixture(scope="module")
def films(phantoms, tmp_path_factory):
    """Twelve films and six files that are none. Not to be written to."""
    folder = tmp_path_factory.mktemp("films") / "films"
    folder.mkdir()
    for i, path in enumerate(sorted(phantoms.rglob("*.jpg"))[:12]):
        shutil.copy(path, folder / f"film-{i}.jpg")
    whole = (folder / "film-0.jpg").read_bytes()
    (folder / "bad-cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "bad-empty.png").write_bytes(b"")
    (folder / "bad-text.jpg").write_bytes(b"not an image at all")
    (folder / "bad-tiff.tif").write_bytes(b"II*\0" + bytes(100))
    (folder / "bad-dicom.dcm").write_bytes(written(radiograph(shapes())))
    os.mkfifo(folder / "bad-pipe")
    return folder


def read(csv: Path) -> pd.DataFrame:
    return pd.read_csv(csv, keep_default_na=False, na_values={})


def test_every_film_is_a_line_and_damaged_ones_say_why(ensemble, films, tmp_path):
    outcome = predict_films(ensemble, [str(films)], tmp_path / "out.csv")
    assert (outcome.films, outcome.unusable) == (18, 6)
    found = read(outcome.csv)
    names = [Path(name).name for name in found["film"]]
    assert names == [
        *("bad-cut.jpg", "bad-dicom.dcm", "bad-empty.png", "bad-pipe", "bad-text.jpg", "bad-tiff.tif"),
        *(f"film-{i}.jpg" for i in range(12)),
    ]
    errors = dict(zip(names, found["error"], strict=True))
    assert errors["bad-cut.jpg"] == "truncated"
    assert errors["bad-empty.png"] == "empty"
    assert errors["bad-text.jpg"] == "not an image"
    assert errors["bad-tiff.tif"] == "unsupported format: TIFF"
    assert errors["bad-pipe"] == "not a file: a pipe, a socket or a device"
    assert errors["bad-dicom.dcm"].startswith(
        "unsupported format: DICOM, and the training set was made from 8-bit images"
    )
    assert "--grey mimic" in errors["bad-dicom.dcm"]
    good = found[found["error"] == ""]
    assert len(good) == 12
    assert set(good["unlike"]) <= {"yes", "no"}, "the runs have a reference"
    assert (found.loc[found["error"] != "", found.columns[5:]] == "").all().all()


def test_columns_are_those_that_the_page_describes(ensemble, films, tmp_path):
    csv = predict_films(ensemble, [str(films / "film-1.jpg")], tmp_path / "out.csv").csv
    columns = list(read(csv).columns)
    label = ensemble.labels[0]
    assert columns[:7] == ["film", "error", "unlike", "reasons", "remarks", "height", "width"]
    assert columns[7:9] == [f"{label}: probability", f"{label}: verdict"]
    for scale in (32, 64):
        assert f"{label}: probability {scale} px" in columns
        for fold in (0, 1):
            assert f"{label}: logit {scale} px fold {fold}" in columns
    assert len(columns) == 7 + len(ensemble.labels) * (2 + 2 + 4)


def test_the_csv_holds_what_the_ensemble_says_and_the_parquet_the_same(ensemble, films, tmp_path):
    csv = predict_films(ensemble, [str(films / "film-*.jpg")], tmp_path / "out.csv").csv
    found = pd.read_csv(csv, keep_default_na=False)
    expected = ensemble.predict([films / f"film-{i}.jpg" for i in range(12)])
    assert found["film"].tolist() == expected["film"].tolist()
    numbers = expected.select_dtypes("number").columns
    np.testing.assert_allclose(found[numbers].astype(float), expected[numbers].astype(float), rtol=2e-4, atol=1e-6)
    verdicts = expected.filter(like="verdict").columns
    assert found[verdicts].equals(expected[verdicts].astype(found[verdicts].dtypes.iloc[0]))
    stored = pd.read_parquet(csv.with_suffix(".parquet"))
    assert list(stored.columns) == list(found.columns)
    for name in numbers:
        np.testing.assert_allclose(stored[name].astype(float), found[name].astype(float), rtol=1e-6)


def test_thresholds_members_and_weights_are_next_to_the_csv(ensemble, films, tmp_path):
    predict_films(ensemble, [str(films / "film-1.jpg")], tmp_path / "out.csv")
    told = json.loads((tmp_path / "out.json").read_text())
    assert told["members"] == [member.name for member in ensemble.members]
    assert told["thresholds"]["rule"] == "youden"
    for label, threshold in zip(ensemble.labels, ensemble.thresholds.probabilities, strict=True):
        found = told["thresholds"]["by_finding"][label]["probability"]
        assert found is None if np.isnan(threshold) else found == threshold
    assert (told["films"], told["unusable"]) == (1, 0)
    assert told["recipe"]["codec"] == "jpeg"


def test_the_same_command_again_gives_the_same_bytes(ensemble, films, tmp_path):
    csv = predict_films(ensemble, [str(films)], tmp_path / "out.csv").csv
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(first) == {"out.csv", "out.parquet", "out.json"}
    predict_films(ensemble, [str(films)], csv)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first


@pytest.mark.parametrize("name", ["out.csv", "out.parquet", "out.json"])
def test_a_file_of_others_is_never_replaced(ensemble, films, tmp_path, name):
    (tmp_path / name).write_bytes(b'{"mine": true}')
    with pytest.raises(RunError, match=rf"{name} exists, and this command did not write it"):
        predict_films(ensemble, [str(films)], tmp_path / "out.csv")
    assert (tmp_path / name).read_bytes() == b'{"mine": true}'


def test_a_csv_that_was_changed_by_hand_is_kept(ensemble, films, tmp_path):
    csv = predict_films(ensemble, [str(films / "film-1.jpg")], tmp_path / "out.csv").csv
    csv.write_text(csv.read_text() + "mine\n")
    with pytest.raises(RunError, match="or it was changed since"):
        predict_films(ensemble, [str(films / "film-1.jpg")], csv)
    assert csv.read_text().endswith("mine\n")


def interrupted(ensemble, given, csv, monkeypatch, after=2) -> int:
    """Predict in batches of two, and be interrupted in batch `after`; returns the films that were answered."""
    monkeypatch.setattr(module, "batch_size", lambda scales, most: 2)
    calls, forward = [], ensemble.forward

    def failing(images):
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt
        return forward(images)

    monkeypatch.setattr(ensemble, "forward", failing)
    with pytest.raises(KeyboardInterrupt):
        predict_films(ensemble, given, csv)
    monkeypatch.setattr(ensemble, "forward", forward)
    return csv.with_name(csv.name + ".part").read_text().count('"film"')


def test_an_interrupted_prediction_goes_on_and_ends_with_the_same_bytes(ensemble, films, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(module, "batch_size", lambda scales, most: 2)
    whole = predict_films(ensemble, [str(films)], tmp_path / "whole.csv").csv
    csv = tmp_path / "out.csv"
    assert interrupted(ensemble, [str(films)], csv, monkeypatch, after=5) == 10
    assert not csv.exists()
    with open(tmp_path / "out.csv.part", "ab") as file:
        file.write(b'{"film":"cut sho')  # as a kill leaves it
    with caplog.at_level("INFO", "cxrfast"):
        predict_films(ensemble, [str(films)], csv)
    assert "resuming: 10 of 18 films are done" in caplog.text
    assert csv.read_bytes() == whole.read_bytes()
    assert csv.with_suffix(".parquet").read_bytes() == whole.with_suffix(".parquet").read_bytes()
    assert not (tmp_path / "out.csv.part").exists()


def test_a_film_that_changed_is_done_again_and_new_ones_too(ensemble, films, tmp_path, monkeypatch):
    folder = tmp_path / "films"
    folder.mkdir()
    for i in range(6):
        shutil.copy(films / f"film-{i}.jpg", folder)
    csv = tmp_path / "out.csv"
    assert interrupted(ensemble, [str(folder)], csv, monkeypatch) == 4
    shutil.copy(films / "film-9.jpg", folder / "film-1.jpg")
    shutil.copy(films / "film-10.jpg", folder / "film-7.jpg")
    predict_films(ensemble, [str(folder)], csv)
    found = pd.read_csv(csv, keep_default_na=False)
    expected = ensemble.predict(found["film"].tolist())
    numbers = expected.select_dtypes("number").columns
    np.testing.assert_allclose(found[numbers].astype(float), expected[numbers].astype(float), rtol=2e-4, atol=1e-6)
    assert len(found) == 7


def test_another_model_starts_over_and_says_so(ensemble, films, study, tmp_path, monkeypatch, caplog):
    csv = tmp_path / "out.csv"
    interrupted(ensemble, [str(films)], csv, monkeypatch)
    other = ScaleEnsemble.from_runs([run for run in Run.find(study) if run.config.scale == 64])
    with caplog.at_level("INFO", "cxrfast"):
        predict_films(other, [str(films)], csv)
    assert "holds answers of another model, device or version: starting over" in caplog.text
    assert "resuming" not in caplog.text
    alone = predict_films(other, [str(films)], tmp_path / "alone.csv").csv
    assert csv.read_bytes() == alone.read_bytes()


def test_two_processes_cannot_write_the_same_output(ensemble, films, tmp_path):
    from cxrfast.inference.working_file import WorkingFile

    with (
        WorkingFile(tmp_path / "out.csv.part", "m", {}),
        pytest.raises(RunError, match="another process is predicting into"),
    ):
        predict_films(ensemble, [str(films)], tmp_path / "out.csv")


def test_a_working_file_of_others_is_kept(ensemble, films, tmp_path):
    (tmp_path / "out.csv.part").write_text("a download\nof mine\n")
    with pytest.raises(RunError, match="was not written by cxrfast predict"):
        predict_films(ensemble, [str(films)], tmp_path / "out.csv")
    assert (tmp_path / "out.csv.part").read_text() == "a download\nof mine\n"


@pytest.mark.parametrize(
    ("out", "why"), [("out.xlsx", "give the name of a CSV file"), ("gone/out.csv", "there is no folder")]
)
def test_an_output_that_cannot_be_written_is_refused_first(ensemble, films, tmp_path, out, why):
    with pytest.raises(RunError, match=why):
        predict_films(ensemble, [str(films)], tmp_path / out)


def test_a_network_that_gives_no_number_is_a_line_with_a_reason(ensemble, films, tmp_path, monkeypatch):
    monkeypatch.setattr(ensemble, "_logits", lambda member, images: torch.full((len(images), 14), float("nan")))
    csv = predict_films(ensemble, [str(films / "film-1.jpg")], tmp_path / "out.csv").csv
    assert read(csv)["error"].tolist() == ["a network gave no finite logit for it"]


def test_a_batch_of_damaged_films_stops_no_network(tmp_path):
    network = Classifier("timm/test_vit", 2, side=32).eval()  # which refuses a batch of no images
    member = Member(name="vit/fold-0", scale=32, fold=0, network=network)
    vit = ScaleEnsemble(labels=("A", "B"), recipe=ImageRecipe(), members=[member], weights={0: np.ones((2, 1))})
    (tmp_path / "a.png").write_bytes(b"no film")
    predict_films(vit, [str(tmp_path / "a.png")], tmp_path / "out.csv")
    table = pd.read_parquet(tmp_path / "out.parquet")
    assert table["error"].ne("").all()
    assert table["A: probability"].isna().all()


def test_names_that_are_formulas_or_no_text_harm_no_table(ensemble, films, tmp_path):
    folder = tmp_path / "films"
    folder.mkdir()
    shutil.copy(films / "film-1.jpg", folder / 'a,b\n"c".jpg')
    shutil.copy(films / "film-2.jpg", os.fsencode(folder) + b"/caf\xe9.jpg")
    csv = predict_films(ensemble, [str(folder)], tmp_path / "out.csv").csv
    assert read(csv)["film"].tolist() == [f'{folder}/a,b\n"c".jpg', f"{folder}/caf\\xe9.jpg"]
    assert read(csv)["error"].tolist() == ["", ""]


# On the command line


def test_the_command_predicts_films_into_the_working_folder(study, films, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = invoke("predict", study, films, films / "film-1.jpg", "--device=cpu")
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("predictions.csv: 18 films, 6 could not be used (column error)")
    assert len(read(tmp_path / "predictions.csv")) == 18


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (["nothing-*.png"], "no file matches nothing-*.png"),
        (["gone.png"], "gone.png is not a run, a shard set or a film"),
        (["--out=x.csv"], "--out is for films"),
    ],
)
def test_mistakes_are_one_message(study, tmp_path, monkeypatch, more, why):
    monkeypatch.chdir(tmp_path)
    done = invoke("predict", study, *more, "--device=cpu")
    assert done.exit_code == 2
    assert why in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_exported_model_predicts_as_its_runs_do(study, films, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert invoke("export", study, "model").exit_code == 0
    assert invoke("predict", study, films / "film-1.jpg", "--device=cpu").exit_code == 0
    done = invoke("predict", "model", films / "film-1.jpg", "--device=cpu", "--out=exported.csv")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "exported.csv").read_bytes() == (tmp_path / "predictions.csv").read_bytes()
    done = invoke("predict", "model")
    assert done.exit_code == 2
    assert "model is an exported model, which predicts films" in done.stderr


@pytest.mark.slow
def test_a_killed_command_is_finished_by_the_same_one_with_the_same_bytes(study, phantoms, tmp_path):
    command = [sys.executable, "-m", "cxrfast", "predict", study, phantoms, "--device=cpu", "--out"]
    subprocess.run([*command, tmp_path / "whole.csv"], check=True, capture_output=True)
    part = tmp_path / "out.csv.part"
    process = subprocess.Popen([*command, tmp_path / "out.csv"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (part.exists() and part.stat().st_size > 2000):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert part.exists()
    subprocess.run([*command, tmp_path / "out.csv"], check=True, capture_output=True)
    assert (tmp_path / "out.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_a_dicom_set_takes_dicom_films_by_its_own_transform(films, tmp_path, ensemble):
    from dataclasses import replace

    mimic = ScaleEnsemble(
        labels=ensemble.labels,
        recipe=replace(ensemble.recipe, grey="mimic"),
        members=ensemble.members,
        weights=ensemble.weights,
    )
    csv = predict_films(mimic, [str(films / "bad-dicom.dcm")], tmp_path / "out.csv").csv
    assert read(csv)["error"].tolist() == [""]
    assert read(csv)["unlike"].tolist() == [""], "without a reference it is not assessed"
