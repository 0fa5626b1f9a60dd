import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import groupby, pairwise
from pathlib import Path
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from trainings import OPTIONS, command, run_to_the_end

import cxrfast.training.train
from cxrfast.cli.main import cli
from cxrfast.config import Runtime
from cxrfast.errors import LoadError, RunError, ShardError
from cxrfast.models.classifier import Classifier
from cxrfast.runs.run import Run
from cxrfast.shards.format.rows import read_rows
from cxrfast.shards.upkeep.verify import verify
from cxrfast.study.plan import make_plan
from cxrfast.training.setup import configure, make_config, select_rows, weights_file
from cxrfast.training.train import train


def test_ranks_that_share_a_cache_of_pixels_train_bitwise_as_without_it(tiny_set: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for name, more in (("plain", []), ("cached", [f"--cache={cache}"])):
        run_to_the_end([*command(tiny_set, tmp_path / name, 2, epochs=1, order="block"), *more])
    weights = [load_file(next((tmp_path / name).glob("*/fold-0")) / "best.safetensors") for name in ("plain", "cached")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert {path.suffix for path in cache.iterdir()} == {".pixels", ".sums"}
    assert next(cache.glob("*.pixels")).stat().st_blocks > 0


RANKS = """
import sys
from pathlib import Path
import torch
from cxrfast.distributed import world
from cxrfast.models.classifier import Classifier
from cxrfast.pipelines.reader import Reader
from cxrfast.runs.run import Run
from cxrfast.shards.format.rows import read_rows
from cxrfast.config import Runtime
from cxrfast.training.setup import make_config, select_rows
from cxrfast.training.trainer import Trainer

shards, folder = map(Path, sys.argv[1:])
with world("cpu") as ranks:
    torch.manual_seed(0)
    config = make_config(shards, 32, device="cpu", weights="none", global_batch=8, micro_batch=4, precision="fp32")
    reader = Reader(shards, 32)
    rows = select_rows(read_rows(shards / "rows.parquet"), config, reader.rows)
    run = Run.start(folder / str(ranks.rank), config, shards, rows)
    trainer = Trainer(run, ranks, Classifier("densenet121", 14), reader, Runtime(shards=shards, runs=folder, quiet=True))
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
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr
    _, before, _, after = done.stdout.split()
    assert float(before) > 1e-4, "each rank keeps statistics of its own while training, or this test shows nothing"
    assert float(after) == 0.0


def test_a_training_leaves_what_the_next_steps_need(tiny_set: Path, tmp_path: Path) -> None:
    config = make_config(tiny_set, 32, device="cpu", **{**OPTIONS, "precision": "auto"})
    run = train(config, Runtime(shards=tiny_set, runs=tmp_path, device="cpu", quiet=True))
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
    again = train(config, Runtime(shards=tiny_set, runs=tmp_path, device="cpu", quiet=True))
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
    run = train(config, Runtime(shards=tiny_set, runs=tmp_path, device="cpu", quiet=True))
    losses = [line["val_loss"] for line in run.metrics()]
    best = int(np.argmin(losses))
    assert len(losses) == best + 3 or len(losses) == 30
    assert len(losses) < 30
    rates = [line["learning_rate"] for line in run.metrics()]
    assert rates[0] == 0.05
    assert all(b in (a, a / 2) for a, b in pairwise(rates))


def test_a_run_of_another_configuration_is_refused_and_its_differences_named(tiny_set: Path, tmp_path: Path) -> None:
    runtime = Runtime(shards=tiny_set, runs=tmp_path, device="cpu", quiet=True)
    train(make_config(tiny_set, 32, device="cpu", **{**OPTIONS, "epochs": 1}), runtime)
    with pytest.raises(RunError, match=r"global_batch: 16, not 8"):
        train(make_config(tiny_set, 32, device="cpu", **{**OPTIONS, "epochs": 1, "global_batch": 16}), runtime)


@pytest.mark.parametrize("damage", [b"", b"junk", None])
def test_a_damaged_checkpoint_is_refused(tiny_set: Path, tmp_path: Path, damage: bytes | None) -> None:
    runtime = Runtime(shards=tiny_set, runs=tmp_path, device="cpu", quiet=True)
    run = train(make_config(tiny_set, 32, device="cpu", **{**OPTIONS, "epochs": 1}), runtime)
    last = run.folder / "last.pt"
    last.write_bytes(last.read_bytes()[:1000] if damage is None else damage)
    (run.folder / "state.json").unlink()
    with pytest.raises(RunError, match=r"last\.pt is damaged"):
        train(run.config, runtime)


def test_sizes_that_do_not_fit_are_named(tiny_set: Path) -> None:
    config = make_config(tiny_set, 32, device="cpu", **{**OPTIONS, "global_batch": 1000, "micro_batch": 10})
    with pytest.raises(LoadError, match="do not fill one global batch of 1000"):
        train(config, Runtime(shards=tiny_set, runs=Path("/nonexistent"), device="cpu", quiet=True))
    with pytest.raises(RunError, match="micro batch 0"):
        make_config(tiny_set, 32, device="cpu", **{**OPTIONS, "micro_batch": 0})


def test_images_that_are_too_small_for_the_network_are_refused(tiny_set: Path, tmp_path: Path) -> None:
    config = make_config(tiny_set, 16, device="cpu", **OPTIONS)
    with pytest.raises(RunError, match="densenet121 cannot be trained on images of 16 px"):
        train(config, Runtime(shards=tiny_set, runs=tmp_path, device="cpu", quiet=True))


def test_an_absent_scale_or_set_is_named(tiny_set: Path, tmp_path: Path) -> None:
    config = make_config(tiny_set, 2048, device="cpu", **OPTIONS)
    with pytest.raises(LoadError, match=r"no shards at 2048 px \(scales there: 32, 64\)"):
        train(config, Runtime(shards=tiny_set, runs=tmp_path, device="cpu", quiet=True))
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
    runtime = Runtime(shards=tiny_set, runs=tmp_path, device="cpu", quiet=True)
    parent = train(make_config(tiny_set, 32, device="cpu", **{**OPTIONS, "epochs": 1, "limit": 16}), runtime)
    options = {**OPTIONS, "epochs": 1, "limit": 16, "weights": str(parent.folder)}
    with pytest.raises(RunError, match="start from a run of the same fold"):
        train(make_config(tiny_set, 64, device="cpu", fold=1, **options), runtime)
    child = train(make_config(tiny_set, 64, device="cpu", **options), runtime)
    assert child.is_done


def test_a_path_of_weights_that_does_not_exist_is_refused(tiny_set: Path) -> None:
    with pytest.raises(RunError, match=r"--weights /nowhere/weights\.pth: /nowhere/weights\.pth does not exist"):
        weights_file(make_config(tiny_set, 32, device="cpu", weights="/nowhere/weights.pth"))
    assert weights_file(make_config(tiny_set, 32, device="cpu", weights="none")) is None


def test_the_official_split_has_one_fold(tiny_set: Path) -> None:
    with pytest.raises(RunError, match="give --fold 0"):
        make_config(tiny_set, 32, device="cpu", split="official", fold=1)


def test_a_training_that_goes_on_needs_its_first_weights_no_more(tiny_set: Path, tmp_path: Path) -> None:
    weights = tmp_path / "first.safetensors"
    runtime = Runtime(shards=tiny_set, runs=tmp_path, device="cpu", quiet=True)
    save_file({k: v.contiguous() for k, v in Classifier("densenet121", 14).state_dict().items()}, weights)
    config = make_config(tiny_set, 32, device="cpu", **{**OPTIONS, "epochs": 1, "limit": 16, "weights": str(weights)})
    run = train(config, runtime)
    weights.unlink()
    (run.folder / "state.json").unlink()
    assert train(config, runtime).is_done


def test_a_failure_of_the_first_rank_ends_all_ranks_with_one_message(tiny_set: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        command(tiny_set, tmp_path, 2, weights="/nowhere.pth"), capture_output=True, text=True, timeout=150
    )
    assert done.returncode != 0
    assert done.stderr.count("/nowhere.pth does not exist") == 1
    assert (
        'Traceback (most recent call last):\n  File "' + str(Path(__file__).parents[2] / "cxrfast") not in done.stderr
    )
    assert not (tmp_path / "densenet121-32").exists()


GRADIENTS = """
import sys
from pathlib import Path
import numpy as np
import torch
from cxrfast.distributed import world
from cxrfast.models.classifier import Classifier
from cxrfast.pipelines.reader import Reader
from cxrfast.runs.run import Run
from cxrfast.shards.format.rows import read_rows
from cxrfast.config import Runtime
from cxrfast.training.setup import make_config, select_rows
from cxrfast.training.trainer import Trainer

shards, folder = map(Path, sys.argv[1:])
with world("cpu") as ranks:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = make_config(
        shards, 32, device="cpu", weights="none", global_batch=16, micro_batch=4, precision="fp32", policy="u_ignore"
    )
    reader = Reader(shards, 32)
    rows = select_rows(read_rows(shards / "rows.parquet"), config, reader.rows)
    run = Run.start(folder / f"of-{ranks.size}-{ranks.rank}", config, shards, rows)
    trainer = Trainer(run, ranks, Classifier("densenet121", 14), reader, Runtime(shards=shards, runs=folder, quiet=True))
    (batch, *_) = trainer.order.global_batches(0)
    rng = np.random.default_rng(0)
    for n, row in enumerate(batch.tolist()):
        # micro-batch j of 4 is rows j::4: of the first all is masked, of the others ever fewer entries
        trainer.targets.host_mask[row] = rng.random(14) < (n % 4) / 4
    trainer.targets.mask = torch.from_numpy(trainer.targets.host_mask)
    found = {}
    trainer.optimizer.step = lambda *a, **k: found.update((n, p.grad.clone()) for n, p in trainer.model.named_parameters())
    trainer.model.train()
    trainer.step(batch, trainer.train_loader.epoch(0))
    if ranks.is_first:
        torch.save(found, folder / f"gradients-{ranks.size}.pt")
    del trainer
"""


def test_two_ranks_have_the_gradients_of_one_that_accumulates_whatever_is_masked(
    tiny_set: Path, tmp_path: Path
) -> None:
    (tmp_path / "gradients.py").write_text(GRADIENTS)
    for start in ([], ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]):
        done = subprocess.run(
            [sys.executable, *start, tmp_path / "gradients.py", tiny_set, tmp_path],
            capture_output=True,
            text=True,
            timeout=150,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        assert done.returncode == 0, done.stderr
    one, two = (torch.load(tmp_path / f"gradients-{n}.pt", weights_only=True) for n in (1, 2))
    assert one.keys() == two.keys()
    assert max(float(gradient.abs().max()) for gradient in one.values()) > 0.01
    for name, gradient in one.items():
        torch.testing.assert_close(two[name], gradient, atol=1e-6, rtol=0, msg=name)


def test_a_list_of_rows_cuts_the_parts_down_and_belongs_to_the_configuration(tiny_set: Path, tmp_path: Path) -> None:
    table, listed = read_rows(tiny_set / "rows.parquet"), tmp_path / "rows.txt"
    wanted = table["row"].to_numpy()[::2]
    listed.write_text("\n".join(map(str, wanted)))
    config = make_config(tiny_set, 32, device="cpu", subset=listed, **OPTIONS)
    rows = select_rows(table, config, table["row"].to_numpy(), wanted)
    assert 50 < len(rows) <= 75
    assert set(rows["row"]) <= set(wanted)
    runtime = Runtime(shards=tiny_set, runs=tmp_path, subset=listed, device="cpu", quiet=True)
    run = train(replace(config, epochs=1), runtime)
    assert set(run.rows()["row"]) == set(rows["row"])
    listed.write_text("\n".join(map(str, wanted[:-4])))
    with pytest.raises(RunError, match="subset: "):
        train(replace(make_config(tiny_set, 32, device="cpu", subset=listed, **OPTIONS), epochs=1), runtime)
    for text, message in (("", "is empty"), ("1\ntwo", "row number a line"), ("1 150", "the set has no row 150")):
        listed.write_text(text)
        with pytest.raises(RunError, match=message):
            train(make_config(tiny_set, 32, device="cpu", subset=listed, **OPTIONS), runtime)


def test_sizes_change_between_epochs_and_validation_keeps_the_scale(tiny_set: Path, tmp_path: Path) -> None:
    config = make_config(tiny_set, 64, device="cpu", **{**OPTIONS, "epochs": 3, "limit": 16}, sizes=((32, 1), (48, 1)))
    assert [config.size_at(epoch) for epoch in range(4)] == [32, 48, 64, 64]
    seen = []

    class Seen(Classifier):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            seen.append((self.training, image.shape[-1]))
            return super().forward(image)

    with patch.object(cxrfast.training.train, "Classifier", Seen):
        run = train(config, Runtime(shards=tiny_set, runs=tmp_path, device="cpu", quiet=True))
    assert [line["size"] for line in run.metrics()] == [32, 48, 64]
    runs = [key for key, _ in groupby(seen[3:])]  # the first three are trials of the sizes
    assert runs == [(True, 32), (False, 64), (True, 48), (False, 64), (True, 64), (False, 64)]


def test_a_run_of_another_set_is_no_start(tiny_set: Path, raw_set: Path, tmp_path: Path) -> None:
    options = {**OPTIONS, "epochs": 1, "limit": 16}
    parent = train(
        make_config(raw_set, 32, device="cpu", **options),
        Runtime(shards=raw_set, runs=tmp_path / "raw", device="cpu", quiet=True),
    )
    child = make_config(tiny_set, 32, device="cpu", **{**options, "weights": str(parent.folder)})
    with pytest.raises(RunError, match="start from a run on the same set"):
        train(child, Runtime(shards=tiny_set, runs=tmp_path, device="cpu", quiet=True))


def test_positives_of_rare_labels_may_weigh_more(tiny_set: Path, tmp_path: Path) -> None:
    runtime = Runtime(shards=tiny_set, runs=tmp_path, device="cpu", quiet=True)
    options = {**OPTIONS, "epochs": 1, "limit": 16}
    plain = train(make_config(tiny_set, 32, device="cpu", **options), runtime)
    weighed = train(
        make_config(tiny_set, 32, device="cpu", **options, positive_weights=True), replace(runtime, name="weighed")
    )
    assert weighed.metrics()[0]["train_loss"] > plain.metrics()[0]["train_loss"]


def test_ranks_and_jobs_share_one_copy_of_the_scale(tiny_set: Path, tmp_path: Path) -> None:
    err = run_to_the_end(command(tiny_set, tmp_path, 2, epochs=1, limit=16, stage=tmp_path / "local"))
    assert err.count("staging: ") == 1
    (copy,) = (path for path in (tmp_path / "local").iterdir() if path.is_dir())
    assert verify(copy, quiet=True).problems == []
    assert [path.name for path in copy.iterdir() if path.is_dir()] == ["32"]
    err = run_to_the_end(command(tiny_set, tmp_path, 1, epochs=1, limit=16, name="next", stage=tmp_path / "local"))
    assert "staging: 0/0" in err or "staging" not in err


def test_options_of_a_file_are_taken_and_those_of_the_command_line_win(tiny_set: Path, tmp_path: Path) -> None:
    file = tmp_path / "options.toml"
    file.write_text(
        'scale = 32\nepochs = 1\nweights = "none"\nlimit = 16\nglobal-batch = 8\nmicro_batch = 8\n'
        'label-policy = ["Edema=u_ones"]\nview = ["AP", "PA"]\npositive_weights = true\nsizes = "32x1"\n'
    )
    given = ["train", f"--shards={tiny_set}", f"--runs={tmp_path}", "--device=cpu", f"--config={file}"]
    done = CliRunner().invoke(cli, [*given, "--micro-batch=4"])
    assert done.exit_code == 0, done.output
    config = Run.open(tmp_path / "densenet121-32" / "fold-0").config
    assert (config.scale, config.epochs, config.limit, config.global_batch, config.micro_batch) == (32, 1, 16, 8, 4)
    assert config.label_policies == (("Edema", "u_ones"),)
    assert config.views == ("AP", "PA")
    assert config.positive_weights
    assert config.sizes == ((32, 1),)
    for text, message in (("epoch = 1", "holds epoch, which is no option"), ("epochs", "is no TOML file")):
        file.write_text(text)
        done = CliRunner().invoke(cli, given)
        assert done.exit_code == 2
        assert message in " ".join(done.output.split()), done.output


def test_the_options_of_a_study_make_the_configuration_of_its_runs(tiny_set: Path, tmp_path: Path) -> None:
    listed = tmp_path / "rows.txt"
    listed.write_text("\n".join(map(str, range(140))))
    recipe = {
        **OPTIONS,
        "subset": listed,
        "views": ("AP", "PA"),
        "label_policies": (("Edema", "u_ones"), ("Fracture", "u_ignore")),
        "positive_weights": True,
        "sizes": ((32, 2), (48, 1)),
    }
    runtime = {"device": "cpu", "profile": True, "cache": tmp_path / "c", "threads": 1, "checkpoint_minutes": 3.0}
    plan = make_plan(tiny_set, tmp_path, [32], [1], recipe=recipe, **runtime)
    taken = {}
    with patch.object(
        cxrfast.training.train, "train", lambda config, runtime: taken.update(config=config, runtime=runtime) or Mock()
    ):
        done = CliRunner().invoke(cli, ["train", *plan.train_options(32, 1)])
    assert done.exit_code == 0, done.output
    assert taken == {"config": plan.config(32, 1, "cpu"), "runtime": plan.runtime}
    changed = {text.partition(":")[0] for text in taken["config"].differences(make_config(tiny_set, 32, device="cpu"))}
    assert changed >= {*recipe, "fold"} - {"precision"}


def test_a_micro_batch_of_auto_fits_is_written_down_and_stays_the_run_s(
    tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    given = {**OPTIONS, "epochs": 1, "limit": 16, "micro_batch": "auto"}
    runtime = Runtime(shards=tiny_set, runs=tmp_path, device="cpu", quiet=True)
    config = configure(runtime, 32, 0, given)
    assert config.micro_batch == 8, "all of the global batch fits"
    train(config, runtime)
    (tmp_path / "cache" / "cxrfast" / "micro-batch.json").unlink()
    assert configure(runtime, 32, 0, given) == config
    assert not (tmp_path / "cache" / "cxrfast" / "micro-batch.json").exists(), "it was not measured again"


def test_batchnorm_over_all_ranks_is_refused_without_gpus(tiny_set: Path, tmp_path: Path) -> None:
    config = make_config(tiny_set, 32, device="cpu", **{**OPTIONS, "epochs": 1, "limit": 16}, sync_bn=True)
    with pytest.raises(RunError, match="--sync-bn works on GPUs only"):
        train(config, Runtime(shards=tiny_set, runs=tmp_path, device="cpu", quiet=True))


def test_a_profile_is_a_trace_of_steps(tiny_set: Path, tmp_path: Path) -> None:
    config = make_config(tiny_set, 32, device="cpu", **{**OPTIONS, "epochs": 1, "global_batch": 4})
    run = train(config, Runtime(shards=tiny_set, runs=tmp_path, device="cpu", quiet=True, profile=True))
    names = {event.get("name") for event in json.loads((run.folder / "profile.json").read_text())["traceEvents"]}
    assert any("convolution" in str(name) for name in names)
    assert any(str(name).startswith("ProfilerStep") for name in names)
