"""The ensemble of networks: its scores are the runs' own logits, mixed as `cxrfast ensemble` mixes them."""

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from runs import make_untrained

from cxrfast.analysis import mixture
from cxrfast.analysis.ensemble import ensemble
from cxrfast.analysis.gradcam import gradcam
from cxrfast.analysis.join import join_logits
from cxrfast.errors import RunError
from cxrfast.inference.ensemble import ScaleEnsemble, stacked
from cxrfast.inference.table import Line, table_of
from cxrfast.metrics import sigmoid
from cxrfast.pipelines.loader import Loader
from cxrfast.pipelines.order import EvalOrder
from cxrfast.pipelines.reader import Reader
from cxrfast.runs.run import Run
from cxrfast.shards.images.bad_image import BadImage
from cxrfast.thresholds import Rule, Thresholds, choose, mean_over_folds


@pytest.fixture(scope="module")
def made(study):
    return ScaleEnsemble.from_runs(Run.find(study))


def source_of(tree: Path, shards: Path, row: int) -> Path:
    with Reader(shards, 32) as reader:
        return tree / reader.shard_set.rows(["row", "path"])["path"].iloc[row]


def test_members_are_in_the_order_of_scale_then_fold_and_share_the_sets_recipe(made, tiny_set):
    assert [(m.scale, m.fold) for m in made.members] == [(32, 0), (32, 1), (64, 0), (64, 1)]
    assert made.scales == (32, 64)
    assert made.folds == (0, 1)
    with Reader(tiny_set, 32) as reader:
        assert made.recipe == reader.info.recipe
    assert not made.training


def test_weights_are_those_that_the_analysis_fits(made, study, tmp_path):
    copy = Path(shutil.copytree(study, tmp_path / "runs"))
    table = ensemble(copy).weights.dropna()
    assert len(table)
    for line in table.itertuples():
        weight = made.weights[line.fold][made.labels.index(line.label), made.scales.index(line.scale)]
        assert weight == line.weight


def test_source_files_of_test_rows_give_the_stored_logits_bit_for_bit(made, study, tiny_set, phantoms):
    for run in Run.find(study):
        stored = run.read_predictions("test")
        films = [made.prepare(source_of(phantoms, tiny_set, row)) for row in stored.row]
        order = EvalOrder(rows=stored.row, micro_batch=run.config.micro_batch)
        with Reader(tiny_set, run.config.scale) as reader:
            loaded = torch.cat([batch.image for batch in Loader(reader, order)])
        images = stacked(films, made.scales)
        assert torch.equal(images[run.config.scale], loaded)
        with torch.inference_mode():
            scores = made(images)
        np.testing.assert_array_equal(scores.logits[run.name].numpy(), stored.logits)


def test_probabilities_are_means_over_folds_of_what_each_fold_mixes(made, tiny_set):
    rows = np.arange(9)
    images = {}
    for scale in made.scales:
        with Reader(tiny_set, scale) as reader:
            (batch,) = Loader(reader, EvalOrder(rows=rows, micro_batch=9))
            images[scale] = batch.image
    with torch.inference_mode():
        scores = made(images)
    by_fold = []
    for fold in made.folds:
        logits = np.stack([scores.logits[m.name].numpy() for m in made.members if m.fold == fold])
        by_fold.append(sigmoid(mixture.log_odds(logits, made.weights[fold])))
    np.testing.assert_allclose(scores.ensemble.numpy(), np.mean(by_fold, axis=0), rtol=1e-12)
    for scale in made.scales:
        own = [sigmoid(scores.logits[m.name].numpy()) for m in made.members if m.scale == scale]
        np.testing.assert_allclose(scores.scales[scale].numpy(), np.mean(own, axis=0), rtol=1e-12)
    assert scores.ensemble.numpy().std(axis=0).max() > 1e-5, "films that score alike would pass whatever the order"


def test_one_scale_is_an_ensemble_of_itself(study):
    runs = [run for run in Run.find(study) if run.config.scale == 64]
    one = ScaleEnsemble.from_runs(runs)
    assert one.scales == (64,)
    with torch.inference_mode():
        scores = one({64: torch.zeros((2, 1, 64, 64), dtype=torch.uint8)})
    torch.testing.assert_close(scores.ensemble, scores.scales[64], rtol=1e-15, atol=0)


def test_thresholds_of_the_ensemble_are_the_mean_of_its_folds_on_their_validation_rows(made, study):
    by_fold = []
    for fold in made.folds:
        runs = [run for run in Run.find(study) if run.config.fold == fold]
        logits, targets, mask = join_logits(runs, "val")
        by_fold.append(choose(mixture.log_odds(logits, made.weights[fold]), targets, mask))
    assert made.thresholds == mean_over_folds(by_fold)
    assert any(threshold is not None for threshold in made.thresholds.logits)
    for member, run in zip(made.members, Run.find(study), strict=True):
        assert member.name == run.name
        assert member.thresholds == run.read_thresholds()


def test_verdicts_say_on_which_side_of_the_threshold_the_probability_is(made, study, tiny_set, phantoms):
    found = made.predict([source_of(phantoms, tiny_set, row) for row in range(20)])
    seen = set()
    for label, threshold in zip(made.labels, made.thresholds.probabilities, strict=True):
        verdicts, probability = found[f"{label}: verdict"], found[f"{label}: probability"]
        if np.isnan(threshold):
            assert set(verdicts) == {""}
        else:
            assert verdicts.tolist() == ["positive" if p >= threshold else "negative" for p in probability]
        seen |= set(verdicts)
    assert seen >= {"positive", "negative"}


def test_weights_that_round_to_more_than_one_leave_no_film_without_a_verdict(made):
    weights = {fold: np.tile(np.nextafter(0.5, 1), (len(made.labels), 2)) for fold in made.folds}
    known = Thresholds(
        rule=Rule(),
        logits=(0.0,) * len(made.labels),
        **dict.fromkeys(("positives", "negatives"), (1,) * len(made.labels)),
        **dict.fromkeys(("sensitivity", "specificity"), (1.0,) * len(made.labels)),
    )
    one = ScaleEnsemble(labels=made.labels, recipe=made.recipe, members=made.members, weights=weights, thresholds=known)
    sure = np.full((1, len(made.members), len(made.labels)), 60, np.float32)
    found = table_of(one, [Line(film="a")], sure).iloc[0]
    assert {found[f"{label}: probability"] for label in made.labels} == {1.0}
    assert {found[f"{label}: verdict"] for label in made.labels} == {"positive"}


def test_films_that_are_all_but_certain_are_told_apart_as_thresholds_were_chosen(made):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 60, (len(made.scales), 500, len(made.labels))).astype(np.float32)
    given = {m.name: torch.from_numpy(logits[made.scales.index(m.scale)]) for m in made.members}
    found = made.combine(given)
    weights = np.mean([made.weights[fold] for fold in made.folds], axis=0)
    np.testing.assert_allclose(found.log_odds.numpy(), mixture.log_odds(logits, weights), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found.scale_log_odds[made.scales[0]].numpy(), logits[0], rtol=1e-9, atol=1e-9)
    assert np.abs(logits).max() > 100, "probabilities of these are rounded to 1"


def test_only_folds_that_every_scale_has_are_taken_and_the_log_says_so(study, tmp_path, caplog):
    copy = Path(shutil.copytree(study, tmp_path / "runs"))
    shutil.rmtree(copy / "mobilenet_v3_small-64" / "fold-1")
    with caplog.at_level("INFO", "cxrfast"):
        part = ScaleEnsemble.from_runs(Run.find(copy))
    assert part.folds == (0,)
    assert "Left out, since not every scale has them: mobilenet_v3_small-32: 1 fold (1)." in caplog.text


def test_runs_that_do_not_belong_together_are_refused(study, tmp_path, tiny_set):
    with pytest.raises(RunError, match="needs one run or more"):
        ScaleEnsemble.from_runs([])
    copy = Path(shutil.copytree(study, tmp_path / "runs"))
    make_untrained(copy, tiny_set, ["test", "val", "train"], 32, 2)
    unpredicted = [run for run in Run.find(copy) if run.config.fold == 2]
    with pytest.raises(RunError, match=r"has no predictions: `cxrfast predict"):
        ScaleEnsemble.from_runs(unpredicted)
    twice = Path(shutil.copytree(study, tmp_path / "twice"))
    shutil.copytree(study / "mobilenet_v3_small-32", twice / "other")
    with pytest.raises(RunError, match="one scale twice"):
        ScaleEnsemble.from_runs(Run.find(twice))
    for name, fold in (("32", 0), ("32", 2), ("64", 1)):
        shutil.rmtree(copy / f"mobilenet_v3_small-{name}" / f"fold-{fold}")
    with pytest.raises(RunError, match="no fold has all scales"):
        ScaleEnsemble.from_runs(Run.find(copy))


def test_a_set_that_is_gone_is_named_and_may_be_given(study, tmp_path, tiny_set):
    copy = Path(shutil.copytree(study, tmp_path / "runs"))
    for config in copy.glob("*/*/config.json"):
        config.write_text(config.read_text().replace(str(tiny_set), str(tmp_path / "gone")))
        (config.parent / "reference.json").unlink(missing_ok=True)
    with pytest.raises(RunError, match=r"set\.json is not in .*gone any more; give the set's folder with --shards"):
        ScaleEnsemble.from_runs(Run.find(copy))
    assert ScaleEnsemble.from_runs(Run.find(copy), shards=tiny_set).scales == (32, 64)


def test_a_path_bytes_and_pixels_of_one_film_score_alike(made, phantoms, tiny_set):
    path = source_of(phantoms, tiny_set, 0)
    expected = made.predict(path)
    assert expected["film"].tolist() == [str(path)]
    both = made.predict([path.read_bytes(), path])
    assert both["film"].tolist() == ["", str(path)]
    pixels = made.predict(cv2.imread(str(path), cv2.IMREAD_GRAYSCALE))
    for found in (both.iloc[[0]], both.iloc[[1]], pixels):
        np.testing.assert_allclose(found.filter(like="probability"), expected.filter(like="probability"), rtol=1e-5)
    assert made.predict([]).empty


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (np.zeros((8, 8, 3), np.uint8), "unsupported format: an array of uint8, 8 × 8 × 3"),
        (np.zeros((8, 8), np.float32), "an array of float32"),
        (b"", "empty"),
        (b"text", "not an image"),
    ],
)
def test_what_is_no_film_is_refused(made, wrong, why):
    with pytest.raises(BadImage, match=why):
        made.prepare(wrong)


def test_files_that_cannot_be_read_are_refused_with_the_reason(made, tmp_path):
    with pytest.raises(BadImage, match="missing"):
        made.prepare(tmp_path / "absent.png")
    with pytest.raises(BadImage, match="not a file"):
        made.prepare(tmp_path)


def test_gradcam_by_scale_is_the_mean_over_folds(made):
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 1, 64, 64), dtype=np.uint8))
    images = {64: image, 32: image[..., ::2, ::2].contiguous()}
    label = made.labels[3]
    maps = made.gradcam(images, label)
    assert {scale: m.shape for scale, m in maps.items()} == {32: (2, 32, 32), 64: (2, 64, 64)}
    own = [gradcam(m.network, images[64], 3)[0].numpy() for m in made.members if m.scale == 64]
    np.testing.assert_allclose(maps[64], np.mean(own, axis=0), rtol=1e-6)
    with pytest.raises(RunError, match="has no finding 'Teeth'"):
        made.gradcam(images, "Teeth")


def test_gradcam_of_one_scale_needs_its_images_alone(made):
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 1, 64, 64), dtype=np.uint8))
    images = {64: image, 32: image[..., ::2, ::2].contiguous()}
    label = made.labels[3]
    every = made.gradcam(images, label)
    for scale in (32, 64):
        alone = made.gradcam({scale: images[scale]}, label)
        assert set(alone) == {scale}
        assert np.array_equal(alone[scale], every[scale])


@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros(2, 1, 64, 64),  # float pixels
        torch.zeros(2, 1, 65, 64, dtype=torch.uint8),
        torch.zeros(2, 3, 64, 64, dtype=torch.uint8),
        torch.zeros(1, 1, 64, 64, dtype=torch.uint8),  # fewer films than at the other scale
        torch.zeros((), dtype=torch.uint8),
        np.zeros((2, 1, 64, 64), np.uint8),
        None,
    ],
)
def test_batches_that_the_networks_were_not_trained_on_are_refused(made, wrong):
    images = {32: torch.zeros(2, 1, 32, 32, dtype=torch.uint8), 64: wrong}
    with pytest.raises(RunError, match=r"32: uint8 \(N, 1, 32, 32\), 64: uint8 \(N, 1, 64, 64\)\}: .*64 px"):
        made(images)


def test_a_batch_without_scales_is_refused(made):
    with pytest.raises(RunError, match="not a Tensor"):
        made(torch.zeros(1, 1, 32, 32, dtype=torch.uint8))
