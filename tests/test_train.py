import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cxrfast.errors import LoadError, RunError, ShardError
from cxrfast.model import Classifier
from cxrfast.runs import Run, read_run
from cxrfast.shards.rows import read_rows
from cxrfast.train import Place, make_config, select_rows, train

OPTIONS = {"weights": "none", "epochs": 2, "global_batch": 8, "micro_batch": 4, "precision": "fp32"}
TIMING = {"seconds", "images_per_s", "waiting_share", "resident_bytes", "gpu_peak_bytes"}


def command(shards: Path, runs: Path, nproc: int = 1) -> list[str]:
    options = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items()]
    start = ["-m", "torch.distributed.run", f"--nproc_per_node={nproc}", "--standalone"] if nproc > 1 else []
    return [
        sys.executable,
        *start,
        "-m",
        "cxrfast.train",
        f"--shards={shards}",
        f"--runs={runs}",
        "--scale=32",
        "--checkpoint-steps=2",
        "--device=cpu",
        *options,
    ]


def run_to_the_end(arguments: list[str]) -> None:
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr


def kill_in_the_middle_of_the_second_epoch(arguments: list[str], last: Path) -> int:
    """SIGKILL the whole process group once a checkpoint of the second epoch's middle is there. Returns its samples."""
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        while process.poll() is None:
            checkpoint = torch.load(last, weights_only=True) if last.exists() else {"epoch": 0}
            if checkpoint["epoch"] == 1 and checkpoint["consumed"]:
                return checkpoint["consumed"]
            time.sleep(0.02)
        raise AssertionError("the training ended before it could be killed")
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def metrics_without_timing(run: Run) -> list[dict[str, object]]:
    return [{k: v for k, v in line.items() if k not in TIMING} for line in run.metrics()]


@pytest.mark.parametrize("nproc", [1, 2])
def test_a_killed_training_ends_with_bitwise_the_weights_of_an_undisturbed_one(
    tiny_set: Path, tmp_path: Path, nproc: int
) -> None:
    whole, killed = (read := lambda name: tmp_path / name / "densenet121-32" / "fold-0")("whole"), read("killed")
    run_to_the_end(command(tiny_set, tmp_path / "whole", nproc))
    consumed = kill_in_the_middle_of_the_second_epoch(command(tiny_set, tmp_path / "killed", nproc), killed / "last.pt")
    assert 0 < consumed < 96
    assert read_run(killed).state()["state"] == "running"
    run_to_the_end(command(tiny_set, tmp_path / "killed", nproc))
    a, b = (torch.load(folder / "last.pt", weights_only=True) for folder in (whole, killed))
    assert a["model"].keys() == b["model"].keys()
    for name in a["model"]:
        assert torch.equal(a["model"][name], b["model"][name]), name
    best_a, best_b = load_file(whole / "best.safetensors"), load_file(killed / "best.safetensors")
    assert all(torch.equal(best_a[name], best_b[name]) for name in best_a)
    assert metrics_without_timing(read_run(whole)) == metrics_without_timing(read_run(killed))
    assert read_run(killed).is_done


def test_ranks_that_share_a_cache_of_pixels_train_bitwise_as_without_it(tiny_set: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for name, more in (("plain", []), ("cached", [f"--cache={cache}"])):
        run_to_the_end([*command(tiny_set, tmp_path / name, nproc=2), "--epochs=1", "--order=block", *more])
    weights = [load_file(next((tmp_path / name).glob("*/fold-0")) / "best.safetensors") for name in ("plain", "cached")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert {path.suffix for path in cache.iterdir()} == {".pixels", ".sums"}
    assert next(cache.glob("*.pixels")).stat().st_blocks > 0


RANKS = """
import sys
from pathlib import Path
import torch
from cxrfast.distributed import world
from cxrfast.model import Classifier
from cxrfast.pipelines.reader import Reader
from cxrfast.runs import start_run
from cxrfast.shards.rows import read_rows
from cxrfast.train import Place, Trainer, make_config, select_rows

shards, folder = map(Path, sys.argv[1:])
with world("cpu") as ranks:
    torch.manual_seed(0)
    config = make_config(shards, 32, device="cpu", weights="none", global_batch=8, micro_batch=4, precision="fp32")
    reader = Reader(shards, 32)
    rows = select_rows(read_rows(shards / "rows.parquet"), config, reader.rows)
    run = start_run(folder / str(ranks.rank), config, shards, rows)
    trainer = Trainer(run, ranks, Classifier("densenet121", 14), reader, Place(shards=shards, runs=folder, quiet=True))
    trainer.train_epoch()
    images = torch.stack([b.image[0] for b, _ in zip(trainer.val_loader.epoch(), range(1))]).expand(4, -1, -1, -1)
    images = ranks.broadcast(images)

    def scores():
        trainer.model.eval()
        with torch.inference_mode():
            return trainer.model(images)

    before = ranks.gather(scores())
    ranks.broadcast_buffers(trainer.model)
    after = ranks.gather(scores())
    if ranks.is_first:
        print("before", float((before[0] - before[1]).abs().max()), "after", float((after[0] - after[1]).abs().max()))
    del trainer
"""


def test_all_ranks_score_the_same_images_alike(tiny_set: Path, tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node=2",
            "--standalone",
            script,
            tiny_set,
            tmp_path / "runs",
        ],
        capture_output=True,
        text=True,
        timeout=150,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    )
    assert done.returncode == 0, done.stderr
    _, before, _, after = done.stdout.split()
    assert float(before) > 1e-4, "each rank keeps statistics of its own while training, or this test shows nothing"
    assert float(after) == 0.0


def test_a_training_leaves_what_the_next_steps_need(tiny_set: Path, tmp_path: Path) -> None:
    config = make_config(tiny_set, 32, device="cpu", **{**OPTIONS, "precision": "auto"})
    run = train(config, Place(shards=tiny_set, runs=tmp_path, device="cpu", quiet=True))
    assert sorted(p.name for p in run.folder.iterdir()) == [
        "best.safetensors",
        "config.json",
        "last.pt",
        "metrics.jsonl",
        "rows.parquet",
        "state.json",
    ]
    lines = run.metrics()
    assert [line["epoch"] for line in lines] == [0, 1]
    for line in lines:
        assert line["train_loss"] > 0
        assert line["val_loss"] > 0
        assert set(line["val_auroc_by_label"]) == set(config.labels)
        assert line["val_auroc_by_label"]["Edema"] is None, "no phantom has edema: undefined, not 0.5"
    assert run.state()["state"] == "done"
    config_file = json.loads((run.folder / "config.json").read_text())
    assert config_file["hash"] == config.hash
    again = train(config, Place(shards=tiny_set, runs=tmp_path, device="cpu", quiet=True))
    assert again.metrics() == lines, "a run that is done is not trained again"


def test_training_stops_when_the_validation_loss_gets_no_better(tiny_set: Path, tmp_path: Path) -> None:
    config = make_config(
        tiny_set,
        32,
        device="cpu",
        weights="none",
        epochs=30,
        global_batch=8,
        learning_rate=0.05,
        stop_after=2,
        patience=1,
        limit=40,
        precision="fp32",
    )
    run = train(config, Place(shards=tiny_set, runs=tmp_path, device="cpu", quiet=True))
    losses = [line["val_loss"] for line in run.metrics()]
    best = int(np.argmin(losses))
    assert len(losses) == best + 3 or len(losses) == 30
    assert len(losses) < 30
    rates = [line["learning_rate"] for line in run.metrics()]
    assert rates[0] == 0.05
    assert all(b in (a, a / 2) for a, b in pairwise(rates))


def test_a_run_of_another_configuration_is_refused_and_its_differences_named(tiny_set: Path, tmp_path: Path) -> None:
    place = Place(shards=tiny_set, runs=tmp_path, device="cpu", quiet=True)
    train(make_config(tiny_set, 32, device="cpu", **{**OPTIONS, "epochs": 1}), place)
    with pytest.raises(RunError, match=r"global_batch: 16, not 8"):
        train(make_config(tiny_set, 32, device="cpu", **{**OPTIONS, "epochs": 1, "global_batch": 16}), place)


@pytest.mark.parametrize("damage", [b"", b"junk", None])
def test_a_damaged_checkpoint_is_refused(tiny_set: Path, tmp_path: Path, damage: bytes | None) -> None:
    place = Place(shards=tiny_set, runs=tmp_path, device="cpu", quiet=True)
    run = train(make_config(tiny_set, 32, device="cpu", **{**OPTIONS, "epochs": 1}), place)
    last = run.folder / "last.pt"
    last.write_bytes(last.read_bytes()[:1000] if damage is None else damage)
    (run.folder / "state.json").unlink()
    with pytest.raises(RunError, match=r"last\.pt is damaged"):
        train(run.config, place)


def test_sizes_that_do_not_fit_are_named(tiny_set: Path) -> None:
    config = make_config(tiny_set, 32, device="cpu", **{**OPTIONS, "global_batch": 1000, "micro_batch": 10})
    with pytest.raises(LoadError, match="do not fill one global batch of 1000"):
        train(config, Place(shards=tiny_set, runs=Path("/nonexistent"), device="cpu", quiet=True))
    with pytest.raises(RunError, match="micro batch 0"):
        make_config(tiny_set, 32, device="cpu", **{**OPTIONS, "micro_batch": 0})


def test_images_that_are_too_small_for_the_network_are_refused(tiny_set: Path, tmp_path: Path) -> None:
    config = make_config(tiny_set, 16, device="cpu", **OPTIONS)
    with pytest.raises(RunError, match="densenet121 cannot be trained on images of 16 px"):
        train(config, Place(shards=tiny_set, runs=tmp_path, device="cpu", quiet=True))


def test_an_absent_scale_or_set_is_named(tiny_set: Path, tmp_path: Path) -> None:
    config = make_config(tiny_set, 2048, device="cpu", **OPTIONS)
    with pytest.raises(LoadError, match=r"no shards at 2048 px \(scales there: 32, 64\)"):
        train(config, Place(shards=tiny_set, runs=tmp_path, device="cpu", quiet=True))
    with pytest.raises(ShardError, match=r"no set\.json"):
        make_config(tmp_path, 32, device="cpu", **OPTIONS)


def test_rows_are_chosen_by_split_view_and_limit(tiny_set: Path) -> None:
    table = read_rows(tiny_set / "rows.parquet")
    held = table["row"].to_numpy()
    everything = select_rows(table, make_config(tiny_set, 32, device="cpu"), held)
    labelled = table[list(everything.columns[4:])].notna().any(axis=1)
    assert set(everything["row"]) == set(table.loc[labelled, "row"])
    frontal = select_rows(table, make_config(tiny_set, 32, device="cpu", views=("AP", "PA")), held)
    assert set(table.set_index("row").loc[frontal["row"], "view"]) == {"AP", "PA"}
    few = select_rows(table, make_config(tiny_set, 32, device="cpu", limit=7), held)
    assert few["part"].value_counts().to_dict() == {"train": 7, "val": 7, "test": 7}
    official = select_rows(table, make_config(tiny_set, 32, device="cpu", split="official"), held)
    for part, name in (("train", "train"), ("val", "validate"), ("test", "test")):
        assert set(table.set_index("row").loc[official.loc[official["part"] == part, "row"], "split"]) == {name}
    for rows in (everything, official):
        assert rows.groupby("patient_id")["part"].nunique().max() == 1
    with pytest.raises(RunError, match="the train part has no rows"):
        select_rows(table, make_config(tiny_set, 32, device="cpu", views=("NONE",)), held)


def test_weights_of_another_fold_are_refused_since_they_have_seen_the_test_patients(
    tiny_set: Path, tmp_path: Path
) -> None:
    place = Place(shards=tiny_set, runs=tmp_path, device="cpu", quiet=True)
    parent = train(make_config(tiny_set, 32, device="cpu", **{**OPTIONS, "epochs": 1, "limit": 16}), place)
    options = {**OPTIONS, "epochs": 1, "limit": 16, "weights": str(parent.folder)}
    with pytest.raises(RunError, match="start from a run of the same fold"):
        train(make_config(tiny_set, 64, device="cpu", fold=1, **options), place)
    child = train(make_config(tiny_set, 64, device="cpu", **options), place)
    assert child.is_done


def test_the_official_split_has_one_fold(tiny_set: Path) -> None:
    with pytest.raises(RunError, match="give --fold 0"):
        make_config(tiny_set, 32, device="cpu", split="official", fold=1)


def test_a_training_that_goes_on_needs_its_first_weights_no_more(tiny_set: Path, tmp_path: Path) -> None:
    weights = tmp_path / "first.safetensors"
    place = Place(shards=tiny_set, runs=tmp_path, device="cpu", quiet=True)
    save_file({k: v.contiguous() for k, v in Classifier("densenet121", 14).state_dict().items()}, weights)
    config = make_config(tiny_set, 32, device="cpu", **{**OPTIONS, "epochs": 1, "limit": 16, "weights": str(weights)})
    run = train(config, place)
    weights.unlink()
    (run.folder / "state.json").unlink()
    assert train(config, place).is_done


def test_a_failure_of_the_first_rank_ends_all_ranks_with_one_message(tiny_set: Path, tmp_path: Path) -> None:
    arguments = [a.replace("--weights=none", "--weights=/nowhere.pth") for a in command(tiny_set, tmp_path, 2)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=150)
    assert done.returncode != 0
    assert done.stderr.count("/nowhere.pth does not exist") == 1
    assert (
        'Traceback (most recent call last):\n  File "' + str(Path(__file__).parent.parent / "cxrfast")
        not in done.stderr
    )
    assert not (tmp_path / "densenet121-32").exists()
