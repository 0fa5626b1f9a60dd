"""What an earlier version wrote is read by this one: tests/data/earlier holds its shard set and two of its runs.

Fold 0 was preempted in its third epoch; fold 1 is done, with predictions. auroc.csv is what `evaluate` made of fold 1, and
continued.json the last line of fold 0's metrics after that version had trained it to its end.
"""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from commands import invoke

from cxrfast.files import sha256
from cxrfast.pipelines.reader import Reader
from cxrfast.shards.format.info import read_set
from cxrfast.shards.format.rows import read_rows
from cxrfast.shards.images.decode import decode, encode
from cxrfast.shards.images.resize import at_scales

EARLIER = Path(__file__).parent / "data" / "earlier"
NAME = "shufflenet_v2_x0_5-32"

TRAIN = (
    f"train --shards set --runs runs --scale 32 --arch {NAME.removesuffix('-32')} --weights none --epochs 3 "
    "--global-batch 4 --micro-batch 2 --precision fp32 --device cpu --learning-rate 0.001 --checkpoint-steps 3 --fold 0"
)


@pytest.fixture
def earlier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the earlier version's folder, and the working directory: its runs name their set by a relative path."""
    copy = Path(shutil.copytree(EARLIER, tmp_path / "earlier"))
    monkeypatch.chdir(copy)
    return copy


def cxrfast(command: str) -> str:
    """What a command that succeeds prints, stdout and stderr."""
    done = invoke(*command.split())
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


@pytest.mark.usefixtures("earlier")
def test_an_earlier_set_is_whole() -> None:
    assert "80 rows at 32 px; 80 planned, 0 quarantined" in cxrfast("verify set --deep")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The tree that the earlier set was made from."""
    cxrfast(f"synth {tmp_path / 'source'} --images 80 --size 64")
    return tmp_path / "source"


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in a folder, by its relative path."""
    return {str(path.relative_to(folder)): sha256(path) for path in folder.rglob("*") if path.is_file()}


def test_an_earlier_set_is_repaired_to_the_bytes_of_its_own_encoder(earlier: Path, source: Path) -> None:
    tars = [earlier / f"set/32/00000{shard}.tar" for shard in (0, 1)]
    tars[0].unlink()
    damaged = bytearray(tars[1].read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF
    tars[1].write_bytes(damaged)
    cxrfast(f"verify set --repair --data {source}")
    assert hashes(earlier / "set") == hashes(EARLIER / "set")


def test_a_scale_added_to_an_earlier_set_is_encoded_as_the_first(earlier: Path, source: Path) -> None:
    before = hashes(earlier / "set")
    assert f"set {read_set(earlier / 'set').id}" in cxrfast(f"shard --data {source} --out set --scale 16")
    after = hashes(earlier / "set")
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {"SHA256SUMS"}
    rows = read_rows(earlier / "set/rows.parquet").head(20)
    with Reader(earlier / "set", 16) as reader:
        for row, path in zip(rows["row"], rows["path"], strict=True):
            pixels = at_scales(decode((source / path).read_bytes(), "none"), [16])[16]
            assert bytes(reader.read(row)) == encode(pixels, 95, "fast")
    assert "80 rows at 16 px" in cxrfast("verify set --deep")


def test_relabelling_adds_no_field_to_an_earlier_set(earlier: Path, source: Path) -> None:
    cxrfast(f"relabel set {source / 'mimic-cxr-2.0.0-negbio.csv.gz'}")
    before, after = (json.loads((folder / "set/set.json").read_text()) for folder in (EARLIER, earlier))
    assert after["labels_from"].startswith("mimic-cxr-2.0.0-negbio")
    assert {**after, "labels_from": ""} == before


def test_a_new_set_of_the_same_images_is_another_and_says_how_it_was_encoded(earlier: Path, source: Path) -> None:
    cxrfast(f"shard --data {source} --out new --scale 32")
    earlier_set, new = read_set(earlier / "set"), read_set(earlier / "new")
    assert (earlier_set.dct, new.dct) == ("fast", "accurate")
    assert json.loads((earlier / "new/set.json").read_text())["dct"] == "accurate"
    assert earlier_set.id != new.id
    assert "fast DCT" in cxrfast("describe set")
    assert "accurate DCT" in cxrfast("describe new")


def test_an_earlier_checkpoint_trains_on_to_its_end(earlier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With as many threads as the earlier version had. The tolerance is for other CPUs, whose last bits differ."""
    monkeypatch.setattr("cxrfast.distributed.usable_cores", lambda: 2)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    expected = json.loads((earlier / "continued.json").read_text())
    run = earlier / "runs" / NAME / "fold-0"
    before = (run / "metrics.jsonl").read_text()
    assert "resuming in epoch 3 after 8 images" in cxrfast(TRAIN)
    assert json.loads((run / "state.json").read_text())["state"] == "done"
    after = (run / "metrics.jsonl").read_text()
    assert after.startswith(before)
    line = json.loads(after.removeprefix(before))
    assert line.keys() == expected.keys()
    assert line["train_loss"] == pytest.approx(expected["train_loss"], abs=0.01)
    assert line["val_loss"] == pytest.approx(expected["val_loss"], abs=0.03)


def test_earlier_predictions_have_the_same_scores(earlier: Path) -> None:
    assert f"without predictions: {NAME}/fold-0" in " ".join(cxrfast("evaluate runs").split())
    scores, expected = (pd.read_csv(path) for path in (earlier / "runs/evaluation/auroc.csv", earlier / "auroc.csv"))
    pd.testing.assert_frame_equal(scores[list(expected)], expected)
