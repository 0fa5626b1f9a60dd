"""Predictions: each row once, with the logits of its own image."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from sets import relabel_rows

from cxrfast.distributed import World
from cxrfast.errors import RunError
from cxrfast.labels import targets
from cxrfast.pipelines.reader import Reader
from cxrfast.runs.reference import read_reference, reference_of
from cxrfast.runs.run import Run, part_rows
from cxrfast.shards.images.jpeg import decode_grey
from cxrfast.thresholds import Rule, choose
from cxrfast.training.predict import PARTS, Looks, predict, source_sizes


@pytest.fixture(scope="module")
def run(trained, tmp_path_factory):
    """A copy of the trained run, into which predictions are written."""
    folder = tmp_path_factory.mktemp("runs") / "densenet121-32" / "fold-0"
    shutil.copytree(trained.folder, folder)
    return Run.open(folder)


def test_every_row_of_a_part_is_predicted_once_with_the_logits_of_its_own_image(run, tiny_set):
    predict(run, World(torch.device("cpu")))
    model, reader = run.load(torch.device("cpu")), Reader(tiny_set, 32)
    for part in PARTS:
        predictions = run.read_predictions(part)
        np.testing.assert_array_equal(predictions.row, part_rows(run.rows(), part))
        images = np.stack([decode_grey(bytes(reader.read(int(row)))) for row in predictions.row])
        with torch.inference_mode():
            alone = torch.cat([model(torch.from_numpy(image)[None, None]) for image in images]).numpy()
        np.testing.assert_allclose(predictions.logits, alone, rtol=1e-3, atol=1e-4)
        assert predictions.logits.std(axis=0).max() > 1e-4, "logits that do not differ would pass whatever the order"


def test_thresholds_are_chosen_on_the_validation_rows_and_keep_the_rule_that_was_chosen(run):
    predict(run, World(torch.device("cpu")))
    first = run.read_thresholds()
    rows = run.rows().query("part == 'val'").sort_values("row")
    raw, config = rows[list(run.config.labels)].to_numpy(np.float32), run.config
    known = targets(raw, config.policies, config.blanks, config.unlabelled)
    logits = run.read_predictions("val").logits
    assert first == choose(logits, *known)
    assert any(threshold is not None for threshold in first.logits)
    wanted = Rule.parse("sensitivity=0.8")
    run.write_thresholds(choose(logits, *known, wanted), len(rows))
    predict(run, World(torch.device("cpu")))
    again = run.read_thresholds()
    assert again.rule == wanted
    assert [s for s in again.sensitivity if s is not None and s < 0.8] == []
    run.thresholds_path.write_text("{")
    before = run.thresholds_path.stat().st_mtime_ns
    with pytest.raises(RunError, match=r"thresholds\.json is damaged"):
        predict(run, World(torch.device("cpu")))
    assert run.thresholds_path.stat().st_mtime_ns == before
    run.thresholds_path.unlink()


def test_weights_that_diverged_give_no_thresholds_and_a_warning(run, tmp_path, caplog):
    other = Run.start(tmp_path / "densenet121-32" / "fold-0", run.config, run.shards, run.rows())
    weights = run.read_weights()
    other.write_weights(
        {name: torch.full_like(value, torch.nan) if "classifier" in name else value for name, value in weights.items()}
    )
    with caplog.at_level("WARNING", "cxrfast"):
        predict(other, World(torch.device("cpu")))
    assert "has no thresholds: some validation logits are not finite" in caplog.text
    assert other.read_thresholds() is None


def test_a_set_that_was_moved_is_found_and_another_set_refused(run, tiny_set, tmp_path):
    moved = tmp_path / "moved"
    moved.symlink_to(tiny_set)
    predict(run, World(torch.device("cpu")), shards=moved)
    other = replace(run, config=replace(run.config, set_id="0" * 32))
    with pytest.raises(RunError, match=r"was trained on set 0+, .* give the right folder with --shards"):
        predict(other, World(torch.device("cpu")), shards=moved)


def test_absent_and_damaged_weights_are_refused(run, tmp_path):
    other = Run.start(tmp_path / "run", run.config, run.shards, run.rows())
    with pytest.raises(RunError, match="train it first"):
        predict(other, World(torch.device("cpu")))
    weights = run.weights_path.read_bytes()
    other.weights_path.write_bytes(weights[: len(weights) // 2])
    with pytest.raises(RunError, match="is damaged"):
        predict(other, World(torch.device("cpu")))


def test_a_run_whose_set_was_relabelled_is_predicted_with_a_warning(run, folder, tmp_path, caplog):
    world = World(torch.device("cpu"))
    with caplog.at_level("WARNING", "cxrfast"):
        predict(run, world, shards=folder)
        assert not caplog.records
        rows = run.rows()
        row = int(rows["row"][rows["Support Devices"] == 1].iloc[0])
        relabel_rows(folder, tmp_path, {(row, "Support Devices"): -1.0})
        predict(run, world, shards=folder)
    (record,) = caplog.records
    assert record.getMessage() == (
        "densenet121-32/fold-0 keeps the labels that it was started with, and its set was relabelled since: 1 label of 1 row "
        f"differs, such as Support Devices of row {row}: 1 then, -1 now; to use the new labels, train in another --runs folder"
    )


def test_the_reference_tells_what_its_validation_films_look_like(trained, tiny_set, tmp_path):
    folder = tmp_path / "densenet121-32" / "fold-0"
    shutil.copytree(trained.folder, folder)
    run = Run.open(folder)
    with Reader(tiny_set, 32) as reader:
        sizes, rows = source_sizes(reader), part_rows(run.rows(), "val")
        assert sizes.shape == (150, 2)
        held = dict(zip(reader.rows.tolist(), sizes.tolist(), strict=True))
        table = reader.shard_set.rows(["row", "height", "width"])
        assert [held[row] for row in table["row"]] == table[["height", "width"]].to_numpy().tolist()
        images = np.stack([decode_grey(bytes(reader.read(int(row)))) for row in rows])
        predict(run, World(torch.device("cpu")))
        found = read_reference(run)
    assert found == (reference_of(images, sizes), reader.info.recipe)


def test_looks_take_the_first_images_only_and_keep_no_batch():
    looks = Looks()
    for start in range(0, 3000, 500):
        batch = (
            torch.arange(start, start + 500).remainder(251).to(torch.uint8)[:, None, None, None].expand(-1, 1, 128, 128)
        )
        looks(batch)
    pixels = looks.pixels()
    assert pixels.shape == (2000, 64, 64)
    assert pixels[:, 0, 0].tolist() == [n % 251 for n in range(2000)]
    assert Looks().pixels().shape[0] == 0
