"""What a training starts from: configuration, rows, staged shards, first weights; wrong options are named."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

import pytest
from commands import invoke
from trainings import FAST, OPTIONS, SHORT, run_ranks

import cxrfast.training.train
from cxrfast.config import Runtime
from cxrfast.errors import LoadError, RunError, ShardError
from cxrfast.runs.run import Run
from cxrfast.shards.format.rows import read_rows
from cxrfast.shards.upkeep.verify import verify
from cxrfast.study.plan import make_plan
from cxrfast.training import setup
from cxrfast.training.setup import make_config, select_rows, staged
from cxrfast.training.train import train


@pytest.mark.parametrize(
    ("scale", "options", "error", "message"),
    [
        (32, {"global_batch": 1000, "micro_batch": 10}, LoadError, "do not fill one global batch of 1000"),
        (2048, {}, LoadError, r"no shards at 2048 px \(scales there: 32, 64\)"),
        (32, {**SHORT, "sync_bn": True}, RunError, "--sync-bn works only on GPUs"),
        (16, {}, RunError, "densenet121 cannot be trained on images of 16 px"),
    ],
)
def test_what_cannot_be_trained_is_named(tiny_set, scale, options, error, message):
    config = make_config(tiny_set, scale, device="cpu", **{**OPTIONS, **options})
    with pytest.raises(error, match=message):
        train(config, Runtime(shards=tiny_set, runs=Path("/nonexistent"), device="cpu"))


def test_a_micro_batch_of_no_images_and_an_absent_set_are_named(tiny_set, tmp_path):
    with pytest.raises(RunError, match="micro batch must be above 0, not 0"):
        make_config(tiny_set, 32, device="cpu", **{**OPTIONS, "micro_batch": 0})
    with pytest.raises(ShardError, match=r"no set\.json"):
        make_config(tmp_path, 32, device="cpu", **OPTIONS)


def test_rows_are_chosen_by_split_view_and_limit(tiny_set):
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
    with pytest.raises(RunError, match="split folds, fold 0: the train part has no rows"):
        select_rows(table, make_config(tiny_set, 32, device="cpu"), held[:0])


def test_a_view_that_no_image_has_is_refused_with_those_there_are(tiny_set):
    table = read_rows(tiny_set / "rows.parquet")
    for wrong in ("frontal", "pa"):
        config = make_config(tiny_set, 32, device="cpu", views=("PA", wrong))
        says = rf"--view '{wrong}': no image of the set has this view position; those there are: 'AP' \(\d+\), 'PA' \(\d+\), "
        with pytest.raises(RunError, match=says):
            select_rows(table, config, table["row"].to_numpy())


def test_a_fold_of_an_official_split_is_refused(tiny_set):
    with pytest.raises(RunError, match="give --fold 0"):
        make_config(tiny_set, 32, device="cpu", split="official", fold=1)


def test_a_list_of_rows_cuts_the_parts_down_and_belongs_to_the_configuration(tiny_set, tmp_path):
    table, listed = read_rows(tiny_set / "rows.parquet"), tmp_path / "rows.txt"
    wanted, options = table["row"].to_numpy()[::2], {**FAST, "epochs": 1, "limit": 20}
    listed.write_text("\n".join(map(str, wanted)))
    config = make_config(tiny_set, 32, device="cpu", subset=listed, **options)
    rows = select_rows(table, config, table["row"].to_numpy(), wanted)
    assert 20 < len(rows) <= 75
    assert set(rows["row"]) <= set(wanted)
    runtime = Runtime(shards=tiny_set, runs=tmp_path, subset=listed, device="cpu")
    run = train(config, runtime)
    assert set(run.rows()["row"]) == set(rows["row"])
    listed.write_text("\n".join(map(str, wanted[:-4])))
    with pytest.raises(RunError, match="subset: "):
        train(make_config(tiny_set, 32, device="cpu", subset=listed, **options), runtime)
    for text, message in (
        ("", "is empty"),
        ("1\ntwo", "one row number per line"),
        ("1 150", "names row 150, which the set does not have"),
    ):
        listed.write_text(text)
        with pytest.raises(RunError, match=message):
            train(make_config(tiny_set, 32, device="cpu", subset=listed, **options), runtime)


def test_jobs_share_one_copy_of_the_scale_and_ranks_make_it_once_per_launch_and_node(tiny_set, tmp_path, monkeypatch):
    copy = staged(tiny_set, tmp_path, 32)
    assert verify(copy).problems == []
    assert [path.name for path in copy.iterdir() if path.is_dir()] == ["32"]
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*.tar")}
    assert staged(tiny_set, tmp_path, 32) == copy
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*.tar")} == before

    calls, copying = [], setup.stage
    monkeypatch.setattr(setup, "stage", lambda *given: calls.append(given) or copying(*given))
    for launch in ("first", "second"):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", launch)
        with ThreadPoolExecutor(4) as ranks:
            copies = [tmp_path / node for node in ("a", "b", "a", "b")]
            list(ranks.map(lambda folder: staged(tiny_set, folder, 32), copies))
    assert len(calls) == 4, "two launches on two nodes"


def test_a_link_with_the_name_of_the_copy_or_of_its_lock_is_refused_and_its_target_stays(tiny_set, tmp_path):
    copy = staged(tiny_set, tmp_path / "first", 32)
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file").write_bytes(b"precious")
    for name, target in ((copy.name, victim), (f"{copy.name}-32.lock", victim / "file")):
        shared = tmp_path / f"shared {name}"
        shared.mkdir()
        (shared / name).symlink_to(target)
        with pytest.raises(RunError, match=rf"--stage: {shared}/.* is a link.*choose a folder of your own"):
            staged(tiny_set, shared, 32)
    assert [path.read_bytes() for path in victim.iterdir()] == [b"precious"]


STAGING = """
import sys
from dataclasses import replace
from pathlib import Path
from trainings import SHORT
from cxrfast.config import Runtime
from cxrfast.training import setup
from cxrfast.training.train import train

shards, folder = map(Path, sys.argv[1:])
copying = setup.stage
setup.stage = lambda *given: print("copying", flush=True) or copying(*given)
config = setup.make_config(shards, 32, device="cpu", **SHORT)
train(config, Runtime(shards=shards, runs=folder, stage=folder / "local", device="cpu"))
"""


@pytest.mark.slow
def test_ranks_share_one_copy_of_the_scale(tiny_set, tmp_path):
    assert run_ranks(STAGING, 2, tiny_set, tmp_path).count("copying") == 1
    (copy,) = (path for path in (tmp_path / "local").iterdir() if path.is_dir())
    assert verify(copy).problems == []
    assert Run.open(tmp_path / "densenet121-32" / "fold-0").is_done


def test_options_of_a_file_are_taken_and_those_of_the_command_line_win(tiny_set, tmp_path):
    file = tmp_path / "options.toml"
    file.write_text(
        'scale = 32\nepochs = 1\nweights = "none"\nlimit = 16\nglobal-batch = 8\nmicro_batch = 8\n'
        'label-policy = ["Edema=u_ones"]\nview = ["AP", "PA"]\npositive_weights = true\nsizes = "32x1"\n'
    )
    given = ["train", f"--shards={tiny_set}", f"--runs={tmp_path}", "--device=cpu", f"--config={file}"]
    done = invoke(*given, "--micro-batch=4")
    assert done.exit_code == 0, done.output
    config = Run.open(tmp_path / "densenet121-32" / "fold-0").config
    assert (config.scale, config.epochs, config.limit, config.global_batch, config.micro_batch) == (32, 1, 16, 8, 4)
    assert config.label_policies == (("Edema", "u_ones"),)
    assert config.views == ("AP", "PA")
    assert config.positive_weights
    assert config.sizes == ((32, 1),)
    for text, message in (("epoch = 1", "sets 'epoch', which is not an option"), ("epochs", "is not a TOML file")):
        file.write_text(text)
        done = invoke(*given)
        assert done.exit_code == 2
        assert message in " ".join(done.output.split()), done.output


def test_the_options_of_a_study_make_the_configuration_of_its_runs(tiny_set, tmp_path):
    listed = tmp_path / "rows.txt"
    listed.write_text("\n".join(map(str, range(140))))
    options = {
        **OPTIONS,
        "views": ("AP", "PA"),
        "label_policies": (("Edema", "u_ones"), ("Fracture", "u_ignore")),
        "positive_weights": True,
        "sizes": ((32, 2), (48, 1)),
    }
    runtime = {"device": "cpu", "profile": True, "cache": tmp_path / "c", "threads": 1, "checkpoint_minutes": 3.0}
    runtime["subset"] = listed
    plan = make_plan(tiny_set, tmp_path, [32], [1], options=options, **runtime)
    with patch.object(cxrfast.training.train, "train") as taken:
        done = invoke("train", "--scale=32", "--fold=1", *plan.train_arguments)
    assert done.exit_code == 0, done.output
    config = plan.config(32, 1, "cpu")
    taken.assert_called_once_with(config, plan.runtime)
    changed = {text.partition(":")[0] for text in config.differences(make_config(tiny_set, 32, device="cpu"))}
    assert changed >= {*options, "subset", "fold"} - {"precision", "epochs"}
    assert config.epochs == OPTIONS["epochs"]
