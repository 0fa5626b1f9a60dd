"""First weights: a run records where its own come from, and refuses those that may have seen its test patients."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from trainings import SHORT

from cxrfast.config import Runtime
from cxrfast.errors import RunError
from cxrfast.files import sha256
from cxrfast.runs.lineage import origin_of
from cxrfast.runs.run import Run
from cxrfast.training.first_weights import refuse_other_fold, weights_file
from cxrfast.training.setup import make_config
from cxrfast.training.train import train


def test_weights_of_another_fold_or_set_are_refused_since_they_may_have_seen_the_test_patients(
    trained, tiny_set, tmp_path
):
    runtime = Runtime(shards=tiny_set, runs=tmp_path, device="cpu")
    options = {**SHORT, "weights": str(trained.folder)}
    with pytest.raises(RunError, match="start from a run of the same fold"):
        train(make_config(tiny_set, 64, device="cpu", fold=1, **options), runtime)
    assert train(make_config(tiny_set, 64, device="cpu", **options), runtime).is_done
    other = replace(trained.config, set_id="0" * 32)
    with pytest.raises(RunError, match="start from a run on the same set"):
        refuse_other_fold(replace(other, weights=str(trained.folder)))


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


def test_absent_weights_are_named(tiny_set):
    with pytest.raises(RunError, match=r"--weights /nowhere/weights\.pth: /nowhere/weights\.pth does not exist"):
        weights_file(make_config(tiny_set, 32, device="cpu", weights="/nowhere/weights.pth"))
    assert weights_file(make_config(tiny_set, 32, device="cpu", weights="none")) is None
