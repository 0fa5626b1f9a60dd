"""Which rows and labels a run uses: the set's own split, patients in two parts, blank labels, images without labels."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from commands import invoke
from sets import rows_of, table_arguments, write_table
from trainings import FAST

from cxrfast.config import TrainConfig
from cxrfast.errors import RunError
from cxrfast.runs.run import Run
from cxrfast.study.plan import make_plan
from cxrfast.training.setup import label_warnings, make_config, select_rows

N = 40
PARTS = ["train"] * 24 + ["val"] * 8 + ["test"] * 8
APART = [f"p{n:02d}" for n in range(N)]
MASS = [n % 2 for n in range(N)]
BATCHES = {**FAST, "epochs": 1}


def build(
    folder: Path, patients: list[str] = APART, *more: str, labels: tuple[str, ...] = ("Mass",), **columns: list
) -> Path:
    tree = write_table(folder / "data", patients, **{"Mass": MASS, **columns})
    done = invoke("shard", *table_arguments(tree, folder / "set", *labels), *more)
    assert done.exit_code == 0, done.output
    return folder / "set"


def train(shards: Path, runs: Path, *more: str):
    options = [f"--{name.replace('_', '-')}={value}" for name, value in BATCHES.items()]
    done = invoke("train", "--shards", shards, "--runs", runs, "--scale=32", "--device=cpu", *options, *more)
    return done.exit_code, " ".join(done.output.split())


def selected(shards: Path, **options) -> pd.DataFrame:
    table = rows_of(shards)
    return select_rows(table, make_config(shards, 32, device="cpu", **options), table["row"].to_numpy())


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    """A set with a split of its own."""
    return build(tmp_path_factory.mktemp("own"), APART, "--split-column=part", part=PARTS)


@pytest.fixture(scope="module")
def leaking(tmp_path_factory) -> Path:
    """Patients p00 to p03 are in train and in test."""
    patients = [*APART[:36], *APART[:4]]
    folder = tmp_path_factory.mktemp("leaking")
    return build(folder, patients, "--split-column=part", "--allow-shared-patients", part=PARTS)


def test_a_split_that_the_user_named_is_used_said_and_stored(own, tmp_path):
    code, output = train(own, tmp_path)
    assert code == 0, output
    assert "split official (column part): 24 train, 8 val, 8 test images" in output
    assert output.index("split official") < output.index("engine host")
    run = Run.open(tmp_path / "shufflenet_v2_x0_5-32/fold-0")
    assert run.config.split == "official"
    assert json.loads(run.config_path.read_text())["config"]["split"] == "official"
    split = rows_of(own).set_index("row")["split"].replace("validate", "val")
    assert run.rows()["part"].tolist() == split.loc[run.rows()["row"]].tolist()
    code, output = train(own, tmp_path, "--split=folds")
    assert code == 2
    assert "split: folds, not official" in output
    code, output = train(own, tmp_path, "--split=official")
    assert code == 0, "the same run"
    for command in (["predict", run.folder, "--device=cpu"], ["evaluate", tmp_path], ["report", tmp_path]):
        assert invoke(*command).exit_code == 0
    note = "Split: official. Uncertain labels: u_zeros; blank labels: negative; images without any label: left out."
    assert note in (tmp_path / "evaluation/auroc.md").read_text()
    assert note in (tmp_path / "report.html").read_text()


def test_the_set_s_folds_are_used_where_nobody_named_a_split(own, tiny_set):
    assert make_config(tiny_set, 32, device="cpu").split == "folds", "MIMIC has an official split"
    assert make_config(own, 32, device="cpu", split="folds", fold=3).split == "folds"
    assert make_config(own, 32, device="cpu").split == "official"


def test_a_fold_of_a_set_with_a_split_of_its_own_is_refused_with_what_to_do(own, tmp_path):
    code, output = train(own, tmp_path, "--fold=2")
    assert code == 2
    assert (
        "was built with --split-column, and its split is used, which has no folds: give --fold 0, or --split folds"
        in output
    )


def test_a_study_of_a_split_of_its_own_has_one_fold(own, tiny_set, tmp_path):
    assert make_plan(own, tmp_path).folds == [0]
    assert make_plan(own, tmp_path, options={"split": "folds"}).folds == [0, 1, 2, 3, 4]
    assert make_plan(tiny_set, tmp_path).folds == [0, 1, 2, 3, 4]
    assert make_plan(tiny_set, tmp_path, options={"split": "official"}).folds == [0]
    done = invoke(
        "study",
        own,
        tmp_path,
        "--dry-run",
        "--device=cpu",
        "--arch=shufflenet_v2_x0_5",
        "--weights=none",
        "--global-batch=8",
    )
    assert done.exit_code == 0, done.output
    assert "shufflenet_v2_x0_5-32/fold-0" in done.output
    assert "fold-1" not in done.output
    done = invoke("study", own, tmp_path, "--dry-run", "--device=cpu", "--fold=1")
    assert done.exit_code == 2
    assert "and its split is used, which has no folds" in " ".join(done.output.split())


def test_job_scripts_of_a_split_of_its_own_train_its_one_fold(own, tmp_path):
    more = [
        "--sbatch",
        tmp_path / "jobs",
        "--device=cpu",
        "--arch=shufflenet_v2_x0_5",
        "--weights=none",
        "--global-batch=8",
    ]
    done = invoke("study", own, tmp_path / "runs", *more)
    assert done.exit_code == 0, done.output
    text = (tmp_path / "jobs" / "train.sh").read_text()
    assert "--array=0-0" in text
    assert "--split" not in text, "each job finds the set's split itself"


def test_folds_of_the_user_s_own_are_the_folds_of_its_runs(tmp_path):
    folds = [str(n % 5) for n in range(N)]
    shards = build(tmp_path, APART, "--split-column=part", part=folds)
    table = rows_of(shards).set_index("row")
    for k in range(5):
        rows = selected(shards, fold=k)
        tested = rows.loc[rows["part"] == "test", "row"]
        assert sorted(table.loc[tested, "image_id"]) == [f"i{n:02d}" for n in range(N) if n % 5 == k]
        assert set(table.loc[rows.loc[rows["part"] == "val", "row"], "block"]) == {2 * k}
    code, output = train(shards, tmp_path / "runs", "--fold=1")
    assert code == 0, output
    assert "split folds, fold 1 (column part): " in output
    with pytest.raises(RunError, match="--split official: the set has no split of its own; use --split folds"):
        selected(shards, split="official")


def test_a_run_of_a_split_that_leaks_is_refused_unless_told_and_then_says_so(leaking, tmp_path):
    for more in ([], ["--split=official"]):
        code, output = train(leaking, tmp_path, *more)
        assert code == 2
        assert "--split official: 4 patients with 8 images are in more than one part, such as row " in output
        assert "--allow-shared-patients" in output
        assert "p00" not in output
        assert not (tmp_path / "shufflenet_v2_x0_5-32").exists()
    code, output = train(leaking, tmp_path, "--split=folds")
    assert code == 0, output
    code, output = train(leaking, tmp_path, "--name=told", "--allow-shared-patients")
    assert code == 0, output
    assert Run.open(tmp_path / "told/fold-0").config.allow_shared_patients
    with pytest.raises(RunError, match="4 patients with 8 images"):
        selected(leaking)
    assert len(selected(leaking, allow_shared_patients=True)) == N


def test_an_earlier_run_of_a_split_that_leaks_goes_on_when_told(leaking, tmp_path):
    """Its configuration, and with it the hash in its checkpoint, stays what it was."""
    config = make_config(leaking, 32, device="cpu", **BATCHES, allow_shared_patients=True)
    folder, earlier = tmp_path / "shufflenet_v2_x0_5-32/fold-0", replace(config, allow_shared_patients=False)
    run = Run.start(folder, earlier, leaking, selected(leaking, allow_shared_patients=True))
    code, output = train(leaking, tmp_path)
    assert code == 2
    assert "are in more than one part" in output
    plan = make_plan(leaking, tmp_path, options={**BATCHES, "allow_shared_patients": True}, device="cpu")
    assert plan.differences(plan.config(32, 0, "cpu"), earlier) == []
    code, output = train(leaking, tmp_path, "--allow-shared-patients")
    assert code == 0, output
    assert Run.open(folder).config == earlier
    assert run.is_done


def test_patients_count_only_where_they_are_used(leaking):
    """Those of a set that leaks may all be outside a list of rows."""
    table = rows_of(leaking)
    alone = table.loc[~table["patient_id"].isin(APART[:4]), "row"].to_numpy()
    config = make_config(leaking, 32, device="cpu")
    assert len(select_rows(table, config, table["row"].to_numpy(), alone)) == N - 8


@pytest.mark.slow
def test_weights_of_a_run_on_another_split_of_the_same_images_are_refused(own, tmp_path):
    """The two sets have one id, since it leaves out the split."""
    other = build(tmp_path, APART, "--split-column=part", part=PARTS[::-1])
    assert rows_of(other)["image_id"].tolist() == rows_of(own)["image_id"].tolist()
    assert make_config(other, 32, device="cpu").set_id == make_config(own, 32, device="cpu").set_id
    code, output = train(own, tmp_path / "first")
    assert code == 0, output
    weights = f"--weights={tmp_path / 'first/shufflenet_v2_x0_5-32/fold-0'}"
    code, output = train(other, tmp_path / "second", weights)
    assert code == 2
    assert "was trained on 16 patients of this run's validation and test parts, such as that of row " in output
    assert train(own, tmp_path / "third", weights)[0] == 0
    for shards, name in ((own, "a"), (other, "b")):
        code, output = train(shards, tmp_path / "both", f"--name={name}")
        assert code == 0, output
        assert invoke("predict", tmp_path / "both" / name / "fold-0", "--device=cpu").exit_code == 0
    done = invoke("evaluate", tmp_path / "both")
    assert done.exit_code == 2
    assert "cannot be joined: 16 test rows are in only one of them" in " ".join(done.output.split())


@pytest.mark.parametrize(
    ("parts", "lacking"), [(["train"] * 30 + ["val"] * 10, "test"), (["train"] * 30 + ["test"] * 10, "val")]
)
def test_a_split_without_a_part_is_refused_with_its_name(tmp_path, parts, lacking):
    shards = build(tmp_path, APART, "--split-column=part", part=parts)
    code, output = train(shards, tmp_path / "runs")
    assert code == 2
    assert f"--split official: the set's own split has no {lacking} rows" in output
    assert len(selected(shards, split="folds")) == N


def test_a_split_is_resolved_before_rows_are_selected(own):
    config = replace(make_config(own, 32, device="cpu"), split="auto")
    with pytest.raises(RunError, match="split auto is not resolved"):
        select_rows(rows_of(own), config, np.arange(N))


def test_fields_of_this_version_leave_the_hash_of_earlier_runs_unless_they_are_given():
    earlier = Path(__file__).parents[1] / "data/earlier/runs/shufflenet_v2_x0_5-32/fold-0/config.json"
    stored = json.loads(earlier.read_text())
    config = TrainConfig.from_json(stored["config"])
    assert config.hash == stored["hash"]
    label = config.labels[0]
    for changed in ({"blank": ((label, "ignore"),)}, {"unlabelled": "negative"}, {"allow_shared_patients": True}):
        assert replace(config, **changed).hash != stored["hash"]
        assert TrainConfig.from_json(json.loads(json.dumps(asdict(replace(config, **changed))))) == replace(
            config, **changed
        )


# Blank labels


@pytest.fixture(scope="module")
def blanks(tmp_path_factory) -> Path:
    """Edema is blank everywhere, Hernia in the training rows; the first four training rows have no label at all."""
    labels = ("Mass", "Edema", "Hernia")
    mass = ["", "", "", "", *MASS[4:]]
    hernia = ["1" if part == "test" else "" for part in PARTS]
    return build(
        tmp_path_factory.mktemp("blanks"),
        APART,
        "--split-column=part",
        labels=labels,
        part=PARTS,
        Mass=mass,
        Edema=[""] * N,
        Hernia=hernia,
    )


def test_labels_that_are_blank_in_every_training_row_are_named_when_training_starts(blanks, tmp_path):
    code, output = train(blanks, tmp_path)
    assert code == 0, output
    assert (
        "blank in every training row, so negative in all of them: Edema, Hernia; --blank LABEL=ignore leaves a"
        in output
    )
    code, output = train(blanks, tmp_path / "told", "--blank=Edema=ignore", "--blank", "Hernia=ignore")
    assert code == 0, output
    assert "so negative" not in output
    assert "no training row counts for Edema, Hernia: nothing is learned about it" in output
    config = Run.open(tmp_path / "told/shufflenet_v2_x0_5-32/fold-0").config
    assert config.blank == (("Edema", "ignore"), ("Hernia", "ignore"))
    assert config.blanks == ("negative", "ignore", "ignore")
    assert label_warnings(replace(config, blank=()), selected(blanks)) == [
        "blank in every training row, so negative in all of them: Edema, Hernia; --blank LABEL=ignore leaves a label out of the "
        "loss"
    ]


def test_one_policy_for_blanks_is_for_the_labels_that_are_not_named(blanks):
    config = make_config(blanks, 32, device="cpu", blank=(("Mass", "negative"), ("", "ignore")))
    assert config.blanks == ("negative", "ignore", "ignore")
    assert make_config(blanks, 32, device="cpu").blanks == ("negative",) * 3


def test_images_without_any_label_are_left_out_or_negative(blanks, tmp_path):
    dropped, kept = selected(blanks), selected(blanks, unlabelled="negative")
    assert len(dropped) == N - 4
    assert len(kept) == N
    code, output = train(blanks, tmp_path, "--unlabelled=negative")
    assert code == 0, output
    assert "24 train, 8 val, 8 test images" in output
    with pytest.raises(
        RunError, match="--unlabelled negative --blank ignore: images without any label would have no label"
    ):
        make_config(blanks, 32, device="cpu", unlabelled="negative", blank=(("", "ignore"),))
