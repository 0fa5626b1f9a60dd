"""External validation in the card is of the exported model itself: folds averaged, its own thresholds, no known patient."""

import numpy as np
import pytest
from others import OTHER_LABELS, other_rows, predict_other
from runs import SMALL, make_run, predict
from sklearn.metrics import recall_score, roc_auc_score

from cxrfast.exports.card.external import validate, validations
from cxrfast.exports.export import export
from cxrfast.inference.ensemble import ScaleEnsemble
from cxrfast.metrics import sigmoid
from cxrfast.models.classifier import Classifier
from cxrfast.runs.external import read_external
from cxrfast.runs.run import Run
from cxrfast.shards.shard_set import ShardSet


@pytest.fixture(scope="module")
def runs(tiny_set, tmp_path_factory) -> list[Run]:
    """Two scales × two folds with predictions on their own rows and on hospital-b."""
    folder = tmp_path_factory.mktemp("runs")
    made = []
    for scale in (32, 64):
        for fold in (0, 1):
            set_id = ShardSet(tiny_set).info.id
            run = make_run(folder, scale, fold, quality=None, arch=SMALL, shards=tiny_set, set_id=set_id)
            run.write_weights(Classifier(SMALL, len(run.config.labels)).state_dict())
            predict(run, 1.0)
            predict_other(run)
            run.set_state("done", epoch=1)
            made.append(run)
    return made


def test_scores_are_sklearns_of_the_averaged_probabilities(runs):
    ensemble = ScaleEnsemble.from_runs(runs)
    by_name = {run.name: run for run in runs}
    found = validate(ensemble, by_name, "hospital-b")
    assert found.labels == ("Edema", "Pneumonia")
    counts = ~other_rows()[list(OTHER_LABELS)].isna().all(axis=1).to_numpy()
    for j, label in enumerate(found.labels):
        at = ensemble.labels.index(label)
        positive = (other_rows()[label] == 1).to_numpy()[counts]
        p = {(r.config.scale, r.config.fold): sigmoid(read_external(r, "hospital-b").logits[counts, at]) for r in runs}
        for scale in (32, 64):
            mean = (p[scale, 0] + p[scale, 1]) / 2
            assert found.scales[scale][j] == pytest.approx(roc_auc_score(positive, mean), abs=1e-12)
        w = {fold: ensemble.weights[fold][at] for fold in (0, 1)}
        mixed = sum(w[fold][s] * p[scale, fold] for fold in (0, 1) for s, scale in enumerate((32, 64))) / 2
        assert found.ensemble[j] == pytest.approx(roc_auc_score(positive, mixed), abs=1e-12)
        verdict = mixed >= sigmoid(ensemble.thresholds.array[at])
        assert found.at.sensitivity[j] == pytest.approx(recall_score(positive, verdict))
        assert found.at.specificity[j] == pytest.approx(recall_score(~positive, ~verdict))
        assert (found.positives[j], found.negatives[j]) == (positive.sum(), (~positive).sum())


def test_the_card_has_a_table_for_each_set_and_its_name_above(runs, tmp_path):
    card = (export(runs, tmp_path / "model") / "README.md").read_text()
    found = validate(ScaleEnsemble.from_runs(runs), {run.name: run for run in runs}, "hospital-b")
    chapter = card.split("### External validation\n", 1)[1].split("\n## ", 1)[0]
    assert "#### hospital-b" in chapter
    (line,) = [line for line in chapter.splitlines() if line.startswith("| Pneumonia |")]
    assert f"| {found.ensemble[1]:.3f} |" in line
    assert f"| {100 * found.at.sensitivity[1]:.1f} % |" in line
    assert "| External validation | hospital-b |" in card


def test_a_set_that_only_some_runs_predicted_is_no_validation_of_the_model(runs, tmp_path):
    ensemble, by_name = ScaleEnsemble.from_runs(runs), {run.name: run for run in runs}
    assert [one.name for one in validations(ensemble, by_name)] == ["hospital-b"]
    predict_other(runs[0], name="hospital-c")
    assert [one.name for one in validations(ensemble, by_name)] == ["hospital-b"]


def test_predictions_that_cannot_be_evaluated_are_left_out_and_the_log_says_why(runs, caplog):
    ensemble, by_name = ScaleEnsemble.from_runs(runs), {run.name: run for run in runs}
    for run in runs:
        predict_other(run, name="hospital-d")
    (runs[0].external_path / "hospital-d.parquet").write_bytes(b"damaged")
    assert [one.name for one in validations(ensemble, by_name)] == ["hospital-b"]
    assert "the model card leaves out the external validation on hospital-d" in caplog.text
    assert not np.isnan(validate(ensemble, by_name, "hospital-b").ensemble).any()
