"""The answers of the process that holds the model."""

import base64
import io
import json
import math

import cv2
import numpy as np
import pytest
import torch
from dicoms import radiograph, written
from pictures import noise, saved, smooth
from PIL import Image

from cxrfast.app import worker
from cxrfast.errors import RunError
from cxrfast.exports.export import export
from cxrfast.inference.ensemble import stacked
from cxrfast.runs.run import Run
from cxrfast.thresholds import Rule, Thresholds


def of(answer: dict) -> dict:
    """As the page gets it."""
    assert "error" not in answer, answer
    return json.loads(json.dumps(answer, allow_nan=False))


def test_a_model_is_an_export_all_runs_the_folds_of_a_scale_or_one_run(runs, model, film, tmp_path):
    export(Run.find(runs), tmp_path / "out")
    expected = worker.scores(model, film)
    assert worker.scores(worker.open_model(tmp_path / "out", "cpu"), film) == expected
    assert worker.scores(worker.open_model(runs, "cpu"), film) == expected
    one = next(run for run in Run.find(runs) if run.config.scale == 64)
    assert [m.name for m in worker.open_model(one.folder, "cpu").members] == [one.name]
    folds = worker.open_model(one.folder.parent, "cpu")
    assert [(m.scale, m.fold) for m in folds.members] == [(64, 0), (64, 1)]
    assert worker.scores(folds, film)["findings"][0]["ensemble"] is None, "one scale is the ensemble"


def test_scores_are_those_of_the_ensemble(model, film):
    found = of(worker.answer(model, {"question": "scores"}, film))
    prepared = model.prepare(film)
    with torch.inference_mode():
        expected = model(stacked([prepared], model.scales))
    for j, finding in enumerate(found["findings"]):
        for scale, score in zip(model.scales, finding["scales"], strict=True):
            assert score["p"] == expected.scales[scale][0, j].item()
        assert finding["ensemble"]["p"] == expected.ensemble[0, j].item()
    assert (found["height"], found["width"]) == (prepared.height, prepared.width)


def log_odds(*probabilities: float) -> np.ndarray:
    p = np.array(probabilities)
    return np.log(p / (1 - p))


def test_verdicts_are_those_of_the_thresholds():
    cut = math.log(0.3 / 0.7)
    thresholds = Thresholds(
        rule=Rule(),
        logits=(cut, cut, None, cut),
        positives=(1, 1, 0, 1),
        negatives=(1, 1, 1, 1),
        sensitivity=(1, 1, None, 1),
        specificity=(1, 1, None, 1),
    )
    found = worker.judged(log_odds(0.31, 0.29, 0.9, np.nan), thresholds)
    assert [one["verdict"] for one in found] == ["positive", "negative", None, None]
    assert [one["threshold"] for one in found] == [pytest.approx(0.3), pytest.approx(0.3), None, pytest.approx(0.3)]
    assert found[3]["p"] is None


def test_certain_probabilities_have_verdicts():
    thresholds = Thresholds(
        rule=Rule(), logits=(0.0, 0.0), positives=(1, 1), negatives=(1, 1), sensitivity=(1, 1), specificity=(1, 1)
    )
    assert [one["verdict"] for one in worker.judged(np.array([-80.0, 80.0]), thresholds)] == ["negative", "positive"]


def test_without_thresholds_there_are_no_verdicts():
    assert worker.judged(log_odds(0.5), None) == [{"p": 0.5, "threshold": None, "verdict": None}]


def test_pictures_are_what_the_networks_get(model, film):
    found = of(worker.answer(model, {"question": "pictures"}, film))
    prepared = model.prepare(film)
    for scale, picture in zip(model.scales, found["pictures"], strict=True):
        shown = cv2.imdecode(np.frombuffer(base64.b64decode(picture), np.uint8), cv2.IMREAD_UNCHANGED)
        assert shown.shape == (scale, scale)
        assert np.abs(shown.astype(int) - prepared.images[scale]).mean() < 3


def test_a_film_is_shown_in_its_own_shape(model):
    found = of(worker.answer(model, {"question": "pictures"}, saved(Image.fromarray(smooth(90, 60)))))
    assert (found["height"], found["width"]) == (90, 60)


def test_a_map_is_grad_cam_of_its_scale_and_finding(model, film):
    for scale in model.scales:
        for finding in (0, 3):
            found = of(worker.answer(model, {"question": "map", "scale": scale, "finding": finding}, film))
            expected = model.gradcam(stacked([model.prepare(film)], model.scales), model.labels[finding])[scale][0]
            values = np.frombuffer(base64.b64decode(found["values"]), np.uint8).reshape(found["side"], found["side"])
            assert found["side"] == scale
            assert np.abs(values / 255 - expected).max() <= 0.5 / 255 + 1e-6
            assert found["is_zero"] == (expected.max() == 0)


def test_a_network_without_a_feature_map_has_no_heat_map(model, film, monkeypatch):
    def has_none(images, label):
        raise RunError("cxrfast does not know the last feature map of maxvit_t")

    monkeypatch.setattr(model, "gradcam", has_none)
    found = of(worker.answer(model, {"question": "map", "scale": 64, "finding": 0}, film))
    assert found == {"undefined": "cxrfast does not know the last feature map of maxvit_t"}


@pytest.mark.parametrize(
    ("film", "words"),
    [
        (b"", "empty"),
        (b"hello", "not an image"),
        (b"<html><script>alert(1)</script>", "not an image"),
        (b"GIF89a", "unsupported format: GIF"),
        (b"PK\3\4" + bytes(100), "not an image"),
        (saved(Image.fromarray(noise(64, 64)))[:-500], "truncated"),
    ],
)
@pytest.mark.parametrize("question", ["scores", "pictures", "map"])
def test_a_film_that_cannot_be_used_is_refused_with_the_reason(model, film, words, question):
    found = worker.answer(model, {"question": question, "scale": 64, "finding": 0}, film)
    assert found == {"status": 422, "error": f"this film cannot be used: {words}"}


def test_patients_of_a_dicom_file_appear_nowhere(model):
    names = {
        "PatientName": "Doe^Jane",
        "PatientID": "4711",
        "StudyDate": "20200102",
        "InstitutionName": "Saint Elsewhere",
    }
    pixels = np.tile(np.arange(80, dtype=np.uint16) * 50, (90, 1))
    film = written(radiograph(pixels, **names))
    damaged = written(radiograph(pixels, **names, Rows=91))
    for question in ("scores", "pictures", "map"):
        task = {"question": question, "scale": 64, "finding": 0}
        assert "error" not in worker.answer(model, task, film)
        for found in (worker.answer(model, task, film), worker.answer(model, task, damaged)):
            assert not [value for value in names.values() if value in json.dumps(found)]


def test_remarks_of_the_decoder_are_passed_on(model):
    found = of(worker.answer(model, {"question": "scores"}, saved(Image.fromarray(np.full((50, 50), 7, np.uint8)))))
    assert found["remarks"] == ["one grey value"]


def test_a_fault_of_ours_is_named_without_its_words(model, film, monkeypatch):
    def fails(film):
        raise ValueError("Doe^Jane")

    monkeypatch.setattr(model, "prepare", fails)
    found = worker.answer(model, {"question": "scores"}, film)
    assert found == {"status": 500, "error": "the model failed on this film (ValueError)"}


def test_memory_that_runs_out_is_named(model, film, monkeypatch):
    def fails(film):
        raise MemoryError

    monkeypatch.setattr(model, "prepare", fails)
    assert worker.answer(model, {"question": "scores"}, film)["status"] == 503


def test_messages_are_read_as_they_were_written():
    stream = io.BytesIO()
    worker.write(stream, {"a": 1})
    worker.write(stream, {"b": [None]})
    stream.seek(0)
    assert [worker.read(stream), worker.read(stream), worker.read(stream)] == [b'{"a": 1}', b'{"b": [null]}', None]
