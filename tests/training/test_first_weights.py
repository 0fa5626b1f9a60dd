"""First weights: a run records where its own come from, and refuses those that may have seen its test patients."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import invoke
from runs import make_untrained
from safetensors.torch import load_file, save_file
from trainings import SHORT

from cxrfast.config import Runtime, TrainConfig
from cxrfast.errors import RunError
from cxrfast.files import sha256
from cxrfast.models.classifier import Classifier
from cxrfast.runs.lineage import origin_of
from cxrfast.runs.run import Run
from cxrfast.training.first_weights import FirstWeights
from cxrfast.training.setup import make_config
from cxrfast.training.train import train


def record(run: Run) -> dict[str, Any]:
    return json.loads(run.config_path.read_bytes())["origin"]


def test_a_run_records_where_its_first_weights_come_from(trained, tiny_set, tmp_path):
    def start(weights, name):
        config = make_config(tiny_set, 64, device="cpu", **{**SHORT, "weights": str(weights)})
        return train(config, Runtime(shards=tiny_set, runs=tmp_path, name=name, device="cpu"))

    assert record(trained) == {"kind": "none"}
    parent = {"kind": "run", "run": trained.name, "set_id": trained.config.set_id, "fold": 0, "split": "folds"}
    parent |= {"labels": list(trained.config.labels), "file": "best.safetensors"}
    parent |= {"sha256": sha256(trained.weights_path), "start": {"kind": "none"}}
    parent |= {"config_hash": trained.config.hash, "division": trained.division}
    first = start(trained.folder, "first")
    assert record(first) == parent
    assert str(tmp_path) not in json.dumps(record(first))
    (tmp_path / "link.safetensors").symlink_to(trained.weights_path)
    for path in (trained.weights_path, tmp_path / "link.safetensors"):
        assert record(start(path, path.stem)) == parent | {"file": path.name}
    second = start(first.folder, "second")
    assert record(second)["start"] == parent
    assert second.origin == Run.open(second.folder).origin
    assert start(first.folder, "second").origin == second.origin
    torch.save(trained.read_weights(), tmp_path / "flat.pth.tar")
    third = start(tmp_path / "flat.pth.tar", "third")
    assert record(third) == {"kind": "file", "file": "flat.pth.tar", "sha256": sha256(tmp_path / "flat.pth.tar")}
    assert origin_of(third) == "flat.pth.tar"


# Patients that the weights have seen


def config_of(shards: Path, weights: object, fold: int = 0, **more: Any) -> TrainConfig:
    return make_config(shards, 64, device="cpu", fold=fold, weights=str(weights), arch="mobilenet_v3_small", **more)


def check(weights: object, shards: Path, fold: int = 0, division: str | None = None, **more: Any) -> FirstWeights:
    """Find first weights for a run of the set, and check its patients."""
    config = config_of(shards, weights, fold)
    config = replace(config, **more)
    found = FirstWeights.find(config)
    found.refuse_seen_patients(config, division, Run.open(RUN_OF[shards]).rows())
    return found


RUN_OF: dict[Path, Path] = {}


@pytest.fixture
def parent(tiny_set, tmp_path) -> Run:
    """An untrained run of fold 1."""
    run = make_untrained(tmp_path / "runs", tiny_set, ["train"] * 3 + ["val", "test"], 32, fold=1)
    RUN_OF[tiny_set] = run.folder
    return run


def strip_record(run: Run) -> None:
    """Rewrite the weights as earlier versions did."""
    save_file(load_file(run.weights_path), run.weights_path, metadata={"config_hash": run.config.hash})


def in_place(run: Run, folder: Path) -> Path:
    return run.weights_path


def copied(run: Run, folder: Path) -> Path:
    return Path(shutil.copy(run.weights_path, folder / "mine.safetensors"))


def renamed(run: Run, folder: Path) -> Path:
    return Path(shutil.copy(run.weights_path, folder / "mine.bin"))


def linked(run: Run, folder: Path) -> Path:
    (folder / "link.safetensors").symlink_to(run.weights_path)
    return folder / "link.safetensors"


def linked_folder(run: Run, folder: Path) -> Path:
    (folder / "fold-0").symlink_to(run.folder)
    return folder / "fold-0"


def of_an_earlier_version(run: Run, folder: Path) -> Path:
    strip_record(run)
    return run.weights_path


def without_metadata(run: Run, folder: Path) -> Path:
    torch.save(load_file(run.weights_path), run.folder / "best.pth")
    return run.folder / "best.pth"


def checkpoint(run: Run, folder: Path) -> Path:
    run.write_checkpoint({"model": run.read_weights(), "epoch": 1})
    return run.checkpoint_path


def copied_checkpoint(run: Run, folder: Path) -> Path:
    return Path(shutil.copy(checkpoint(run, folder), folder / "mine.pt"))


def in_the_folder_of_another_run(run: Run, folder: Path) -> Path:
    """Its neighbour's weights were overwritten by its own."""
    shards = run.shards
    other = make_untrained(folder / "other", shards, ["train"] * 3 + ["val", "test"], 32, fold=0)
    shutil.copy(run.weights_path, other.weights_path)
    return other.folder


WAYS = [in_place, copied, renamed, linked, linked_folder, of_an_earlier_version, without_metadata]
WAYS += [checkpoint, copied_checkpoint, in_the_folder_of_another_run]


@pytest.mark.parametrize("give", [lambda run, _: run.folder, *WAYS])
def test_weights_are_judged_as_their_run_however_they_are_given(parent, tiny_set, tmp_path, give):
    path = give(parent, tmp_path)
    with pytest.raises(
        RunError, match=r"was trained on fold 1, whose training rows hold patients of this run's"
    ) as error:
        check(path, tiny_set, fold=0, split=parent.config.split)
    assert str(error.value).startswith(f"--weights {path} was trained on ")
    assert "start from a run of the same fold, or, if " in str(error.value)
    assert "add --allow-shared-patients; tables then say so" in str(error.value)
    found = check(path, tiny_set, fold=1, split=parent.config.split)
    assert found.origin.kind == "run"
    assert found.origin.run in (parent.name, path.name, "other/fold-0")
    assert found.origin.labels == parent.config.labels


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"set_id": "f" * 32},
            r"was trained on set [0-9a-f]{32}, whose training rows may hold .* \(set f{32}\): start from a run on",
        ),
        ({"split": "official", "fold": 0}, r"was trained on fold 1, whose .* \(the official split\)"),
    ],
)
def test_weights_of_another_set_or_split_are_refused_by_file_too(parent, tiny_set, tmp_path, change, message):
    for path in (parent.folder, copied(parent, tmp_path)):
        with pytest.raises(RunError, match=message):
            check(path, tiny_set, **{"fold": 1, "split": "auto", **change})


def test_shared_patients_can_be_allowed_and_are_then_said(parent, tiny_set, tmp_path, caplog):
    check(copied(parent, tmp_path), tiny_set, fold=0, split="auto", allow_shared_patients=True)
    assert "was trained on fold 1" in caplog.text
    assert "continuing, with --allow-shared-patients" in caplog.text


def test_a_chain_is_judged_by_each_of_its_runs(parent, tiny_set, tmp_path):
    """A run of this fold that started from one of another fold knows this fold's test patients too."""
    origin = parent.as_origin()
    child = make_untrained(tmp_path / "runs", tiny_set, ["train"] * 3 + ["val", "test"], 64, fold=0)
    config = json.loads(child.config_path.read_bytes())
    child.config_path.write_text(json.dumps(config | {"origin": origin.json()}))
    child = Run.open(child.folder)
    child.write_weights(Classifier("mobilenet_v3_small", len(child.config.labels)).state_dict())
    for path in (child.folder, copied(child, tmp_path)):
        with pytest.raises(RunError, match=rf"started from {parent.name}, which was trained on fold 1, whose"):
            check(path, tiny_set, fold=0, split="auto")
    grandchild = check(copied(child, tmp_path), tiny_set, fold=0, split="auto", allow_shared_patients=True)
    run = replace(child, origin=grandchild.origin)
    assert origin_of(run) == f"from {child.name}, which started from {parent.name}, another fold"


def test_a_set_that_was_split_otherwise_is_known_by_its_division(parent, tiny_set, tmp_path):
    """Two sets of the same images have one id, whatever their split columns say."""
    config = json.loads(parent.config_path.read_bytes())
    parent.config_path.write_text(json.dumps(config | {"division": "a" * 16}))
    parent = Run.open(parent.folder)
    parent.write_weights(parent.read_weights())
    path = copied(parent, tmp_path)
    check(path, tiny_set, fold=1, division="a" * 16, split="auto")
    check(path, tiny_set, fold=1, division=None, split="auto")
    with pytest.raises(RunError, match="was trained when this set was split into other parts"):
        check(path, tiny_set, fold=1, division="b" * 16, split="auto")
    check(parent.folder, tiny_set, fold=1, division="b" * 16, split="auto")  # its rows say that no patient is shared


def test_weights_copied_from_a_run_of_an_earlier_version_may_be_of_any_fold(parent, tiny_set, tmp_path):
    strip_record(parent)
    path = copied(parent, tmp_path)
    for fold in (0, 1):
        with pytest.raises(
            RunError, match=r"comes from an earlier version, which did not write down .* give the folder of its run"
        ):
            check(path, tiny_set, fold=fold, split="auto")
    found = check(path, tiny_set, fold=0, split="auto", allow_shared_patients=True)
    told = origin_of(replace(parent, origin=found.origin))
    assert told == "from a run of an earlier version (mine.safetensors), set and fold unknown"


def test_a_copy_of_weights_that_were_trained_on_shared_patients_may_have_seen_any_of_them(parent, tiny_set, tmp_path):
    """Its run's rows could tell which, and are not at hand."""
    parent = Run.open(parent.folder)
    sharing = replace(parent, config=replace(parent.config, allow_shared_patients=True))
    sharing.write_weights(parent.read_weights())
    path = copied(sharing, tmp_path)
    with pytest.raises(
        RunError, match=r"was trained with --allow-shared-patients, .* trained without it, or, if you know"
    ):
        check(path, tiny_set, fold=1, split="auto")
    check(parent.folder, tiny_set, fold=1, split="auto")  # its rows say that no patient is shared
    assert check(path, tiny_set, fold=1, split="auto", allow_shared_patients=True).origin.shared_patients


def test_a_damaged_record_in_a_file_of_weights_is_refused(parent, tiny_set, tmp_path):
    for text in ("{", "[]", '{"kind": "run", "fold": "one"}', '{"kind": "run", "run": "a\\u001b[2Jb"}', "[" * 10**5):
        save_file(load_file(parent.weights_path), tmp_path / "mine.safetensors", metadata={"cxrfast": text})
        with pytest.raises(RunError, match=r"not an origin of weights|is not a checkpoint") as error:
            check(tmp_path / "mine.safetensors", tiny_set, fold=1)
        assert "\x1b" not in str(error.value)
        assert str(error.value).count(str(tmp_path)) == 1, "the file is named once"


def test_weights_of_another_run_in_a_run_s_folder_are_not_taken_for_its_own(parent, tmp_path):
    other = in_the_folder_of_another_run(parent, tmp_path)
    with pytest.raises(RunError, match=r"best\.safetensors belongs to another configuration"):
        Run.open(other).load()


def test_files_of_other_programs_say_nothing_and_are_taken(parent, tiny_set, tmp_path):
    torch.save(load_file(parent.weights_path), tmp_path / "flat.pth.tar")
    torch.save({"state_dict": load_file(parent.weights_path), "cxrfast": 3, "config_hash": 5}, tmp_path / "theirs.pth")
    for name in ("flat.pth.tar", "theirs.pth"):
        found = check(tmp_path / name, tiny_set)
        assert found.origin == replace(found.origin, kind="file", file=name, run=None, labels=None)


def test_an_unfinished_run_is_said_to_be_one_and_a_run_without_weights_is_refused(parent, tiny_set, tmp_path, caplog):
    model, config = Classifier("mobilenet_v3_small", len(parent.config.labels)), config_of(tiny_set, parent.folder, 1)
    FirstWeights.find(config).load_into(model, config)
    assert "that run has not finished" in caplog.text
    caplog.clear()
    parent.set_state("done")
    FirstWeights.find(config).load_into(model, config)
    assert "has not finished" not in caplog.text
    parent.weights_path.unlink()
    with pytest.raises(RunError, match=r"that run has no best\.safetensors yet: train it first"):
        FirstWeights.find(config)


# Outputs


@pytest.mark.parametrize(
    ("change", "level", "message"),
    [
        (lambda labels: labels, "INFO", "the last layer is taken over by name, 14 of 14 findings"),
        (lambda labels: labels[::-1], "INFO", "the last layer is taken over by name, 14 of 14 findings"),
        (
            lambda labels: ("Tube", *labels[1:]),
            "WARNING",
            "by name, 13 of 14 findings; Tube starts at random; Atelectasis of the file is not used",
        ),
    ],
)
def test_outputs_follow_their_findings_into_a_run_with_other_labels(parent, tiny_set, caplog, change, level, message):
    caplog.set_level("INFO")
    torch.manual_seed(9)
    model = Classifier("mobilenet_v3_small", 14)
    random, labels = model.net.classifier[3].weight.clone(), change(parent.config.labels)
    config = replace(config_of(tiny_set, parent.folder, 1), labels=labels)
    FirstWeights.find(config).load_into(model, config)
    theirs = parent.read_weights()["net.classifier.3.weight"]
    for i, label in enumerate(labels):
        known = label in parent.config.labels
        assert torch.equal(
            model.net.classifier[3].weight[i], theirs[parent.config.labels.index(label)] if known else random[i]
        ), label
    (said,) = (line for line in caplog.records if "last layer" in line.message)
    assert said.levelname == level
    assert message in said.message


def test_outputs_of_a_file_without_names_stay_random_and_that_is_said(parent, tiny_set, tmp_path, caplog):
    torch.save(load_file(parent.weights_path), tmp_path / "flat.pth")
    torch.manual_seed(9)
    model = Classifier("mobilenet_v3_small", 14)
    random = model.net.classifier[3].weight.clone()
    config = config_of(tiny_set, tmp_path / "flat.pth")
    FirstWeights.find(config).load_into(model, config)
    assert torch.equal(model.net.classifier[3].weight, random)
    assert torch.equal(model.net.features[0][0].weight, parent.read_weights()["net.features.0.0.weight"])
    assert "the last layer starts at random, since the file does not name the findings of its outputs" in caplog.text


def test_imagenet_s_last_layer_is_said_to_be_replaced(parent, tiny_set, tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO")
    torch.save(load_file(parent.weights_path), tmp_path / "imagenet.pth")
    monkeypatch.setattr("cxrfast.training.first_weights.fetch_weights", lambda arch: tmp_path / "imagenet.pth")
    config = config_of(tiny_set, "imagenet")
    found = FirstWeights.find(config)
    found.load_into(Classifier("mobilenet_v3_small", 14), config)
    assert "the last layer starts at random, since ImageNet has other classes" in caplog.text
    assert found.origin.json() == {
        "kind": "imagenet",
        "file": "imagenet.pth",
        "sha256": sha256(tmp_path / "imagenet.pth"),
    }


# The command


def test_a_leak_that_was_allowed_stands_in_every_table(tiny_set, tmp_path):
    def run(*arguments: object) -> str:
        done = invoke(*arguments)
        assert done.exit_code == 0, done.output
        return done.output

    options = ["--shards", tiny_set, "--runs", tmp_path, "--device=cpu", "--arch=shufflenet_v2_x0_5", "--limit=8"]
    options += ["--global-batch=8", "--micro-batch=8", "--epochs=1", "--precision=fp32"]
    run("train", *options, "--scale=32", "--fold=1", "--weights=none", "--name=shufflenet_v2_x0_5-32")
    weights = shutil.copy(tmp_path / "shufflenet_v2_x0_5-32/fold-1/best.safetensors", tmp_path / "mine.safetensors")
    child = [*options, "--scale=64", "--fold=0", f"--weights={weights}"]
    refused = invoke("train", *child)
    assert refused.exit_code == 2
    assert "was trained on fold 1" in " ".join(refused.output.split())
    assert not (tmp_path / "shufflenet_v2_x0_5-64").exists()
    run("train", *child, "--allow-shared-patients")
    run("predict", tmp_path / "shufflenet_v2_x0_5-64/fold-0", "--device=cpu")
    run("evaluate", tmp_path)
    run("report", tmp_path)
    told = "from shufflenet_v2_x0_5-32/fold-1, another fold"
    for name in ("evaluation/auroc.md", "evaluation/auroc.csv", "report.html"):
        assert told in (tmp_path / name).read_text(), name
    assert "patients may be in two parts (--allow-shared-patients)" in (tmp_path / "evaluation/auroc.md").read_text()


def test_absent_weights_are_named(tiny_set, tmp_path):
    with pytest.raises(RunError, match=r"^--weights /nowhere/weights\.pth does not exist"):
        FirstWeights.find(make_config(tiny_set, 32, device="cpu", weights="/nowhere/weights.pth"))
    with pytest.raises(RunError, match=r"does not exist; use imagenet, none, a \.pth or \.safetensors file, or a run"):
        FirstWeights.find(make_config(tiny_set, 32, device="cpu", weights=str(tmp_path)))
    assert FirstWeights.find(make_config(tiny_set, 32, device="cpu", weights="none")).file is None
