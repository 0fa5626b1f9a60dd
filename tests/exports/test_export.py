"""An export holds everything that its networks need, gives their logits bit for bit, and tells nothing about the machine."""

import getpass
import json
import re
import shutil
import socket
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open

import cxrfast
from cxrfast.cli.main import cli
from cxrfast.errors import RunError
from cxrfast.exports import export as module
from cxrfast.exports.export import check_free, export, files_in, select
from cxrfast.inference.ensemble import ScaleEnsemble
from cxrfast.runs.run import Run


@pytest.fixture(scope="module")
def out(study, tmp_path_factory) -> Path:
    """An export of the whole study, with TorchScript and torchvision. Not to be written to."""
    return export(Run.find(study), tmp_path_factory.mktemp("export") / "model", formats=("torchscript", "torchvision"))


@pytest.fixture(scope="module")
def made(study) -> ScaleEnsemble:
    return ScaleEnsemble.from_runs(Run.find(study))


def films(made: ScaleEnsemble, n: int = 3) -> dict[int, torch.Tensor]:
    rng = np.random.default_rng(0)
    return {s: torch.from_numpy(rng.integers(0, 256, (n, 1, s, s), np.uint8)) for s in made.scales}


def test_the_folder_holds_a_file_per_network_and_format_and_hashes_that_sha256sum_accepts(out):
    stems = [f"mobilenet_v3_small-{scale}-fold-{fold}" for scale in (32, 64) for fold in (0, 1)]
    expected = {"model.json", "README.md", "SHA256SUMS"}
    expected |= {f"weights/{stem}.safetensors" for stem in stems} | {f"torchscript/{stem}.pt" for stem in stems}
    expected |= {f"torchvision/{stem}.safetensors" for stem in stems}
    assert set(files_in(out)) == expected
    checked = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=out, capture_output=True, text=True, check=True)
    assert checked.stdout.count(": OK\n") == len(expected) - 1


def test_a_loaded_model_gives_bitwise_the_logits_and_probabilities_of_the_runs(out, made):
    loaded, images = cxrfast.load(out), films(made, 7)
    with torch.inference_mode():
        theirs, ours = loaded(images), made(images)
    assert theirs.logits.keys() == ours.logits.keys()
    for name, logits in ours.logits.items():
        assert torch.equal(theirs.logits[name], logits)
        assert logits.std() > 0
    for scale in made.scales:
        assert torch.equal(theirs.scales[scale], ours.scales[scale])
    assert torch.equal(theirs.ensemble, ours.ensemble)


def test_a_loaded_model_is_the_one_that_was_exported(out, made):
    loaded = cxrfast.load(str(out))
    assert isinstance(loaded, torch.nn.Module)
    assert not loaded.training
    assert (loaded.labels, loaded.recipe, loaded.thresholds) == (made.labels, made.recipe, made.thresholds)
    for mine, theirs in zip(loaded.members, made.members, strict=True):
        assert (mine.name, mine.scale, mine.fold, mine.precision) == (
            theirs.name,
            theirs.scale,
            theirs.fold,
            theirs.precision,
        )
        assert (mine.micro_batch, mine.thresholds) == (theirs.micro_batch, theirs.thresholds)
    for fold, weights in made.weights.items():
        np.testing.assert_array_equal(loaded.weights[fold], weights)


def test_a_loaded_model_takes_paths_arrays_and_several_of_them(out, made, phantoms):
    loaded = cxrfast.load(out)
    paths = sorted(phantoms.rglob("*.jpg"))[:3]
    table = loaded.predict(paths)
    assert len(table) == 3
    assert table.equals(made.predict(paths))
    pixels = np.random.default_rng(0).integers(0, 256, (80, 70), np.uint8)
    assert loaded.predict(pixels).equals(made.predict(pixels))
    assert len(loaded.predict([paths[0], pixels])) == 2


def test_no_file_names_the_machine_the_user_a_path_a_patient_or_an_image(out, study, tiny_set, phantoms):
    rows = Run.find(study)[0].rows(["image_id", "patient_id"])
    folders = {study, tiny_set, phantoms, out.parent, Path.home(), Path.cwd()} - {Path("/")}
    secret = [str(folder).encode() for folder in folders] + [b"/pytest-"]
    secret += [text.encode() for text in (*rows["image_id"], *rows["patient_id"])]
    words = (
        rb"\b(?:" + b"|".join(re.escape(name.encode()) for name in (socket.gethostname(), getpass.getuser())) + rb")\b"
    )
    for name in files_in(out):
        data = (out / name).read_bytes()
        assert not [text for text in secret if text in data], name
        assert not re.search(rb"(?:^|[\s\"'])/(?:home|root|tmp|usr|var)/", data), name
        if name in ("README.md", "model.json"):  # pixels and weights may spell a short word by chance
            assert not re.search(words, data), name


def test_weights_say_which_run_trained_them_so_that_a_later_training_is_judged_by_it(out, study):
    run = Run.find(study)[0]
    with safe_open(out / f"weights/{run.folder.parent.name}-fold-{run.config.fold}.safetensors", "pt") as file:
        assert json.loads(file.metadata()["cxrfast"]) == json.loads(json.dumps(run.as_origin().json()))


def test_first_weights_that_were_a_path_are_not_told(study, tmp_path):
    run = Run.find(study)[0]
    assert module.shareable(run)["weights"] == "imagenet"
    copy = Run.open(shutil.copytree(run.folder, tmp_path / "a-32" / "fold-0"))
    stored = json.loads(copy.config_path.read_text())
    stored["config"]["weights"] = "/home/someone/weights.pth"
    del stored["hash"]
    stored["origin"] = {"kind": "file", "file": "weights.pth"}
    copy.config_path.write_text(json.dumps(stored))
    told = json.dumps([module.shareable(Run.open(copy.folder)), Run.open(copy.folder).origin.json()])
    assert "someone" not in told
    assert "weights.pth" in told


def test_scales_and_folds_are_chosen_and_what_is_not_there_is_named(study, tmp_path):
    runs = Run.find(study)
    assert [(r.config.scale, r.config.fold) for r in select(runs, scales=[64])] == [(64, 0), (64, 1)]
    assert [(r.config.scale, r.config.fold) for r in select(runs, folds=[1], scales=[32])] == [(32, 1)]
    assert len(select(runs, names=["mobilenet_v3_small-64"])) == 2
    for asked, message in (
        ({"scales": [128]}, "no run has scale 128: there are 32, 64"),
        ({"folds": [0, 4]}, "no run has fold 4: there are 0, 1"),
        ({"names": ["x"]}, "no run has name x: there are mobilenet_v3_small-32, mobilenet_v3_small-64"),
    ):
        with pytest.raises(RunError, match=message):
            select(runs, **asked)
    one = export(select(runs, scales=[64], folds=[1]), tmp_path / "one")
    loaded = cxrfast.load(one)
    assert (loaded.scales, loaded.folds, len(loaded.members)) == ((64,), (1,), 1)
    with torch.inference_mode():
        scores = loaded(films(loaded))
    (logits,) = scores.logits.values()
    torch.testing.assert_close(scores.ensemble, logits.double().sigmoid(), rtol=0, atol=0)


def test_finished_only_leaves_out_unfinished_runs_and_says_so_if_none_is_left(study, tmp_path):
    runs = Run.find(shutil.copytree(study, tmp_path / "runs"))
    with pytest.raises(
        RunError, match="none of the runs is finished: finish the training, or leave out --finished-only"
    ):
        select(runs, finished_only=True)
    runs[0].set_state("done", epoch=1)
    assert [run.name for run in select(runs, finished_only=True)] == [runs[0].name]


def test_runs_without_predictions_are_refused_with_the_command_and_nothing_is_left(study, tmp_path):
    runs = Run.find(shutil.copytree(study, tmp_path / "runs"))
    shutil.rmtree(runs[0].predictions_path)
    with pytest.raises(RunError, match=f"{runs[0].name} has no predictions: `cxrfast predict"):
        export(runs, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_an_export_replaces_an_earlier_one_whole(study, tmp_path):
    runs = Run.find(study)
    export(select(runs, scales=[32], folds=[0]), tmp_path / "model")
    export(select(runs, scales=[64], folds=[1]), tmp_path / "model")
    assert [m.name for m in cxrfast.load(tmp_path / "model").members] == ["mobilenet_v3_small-64/fold-1"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_that_is_no_export_or_that_somebody_changed_is_refused_and_stays(out, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    check_free(other)
    (other / "thesis.tex").write_text("years of work")
    with pytest.raises(RunError, match="other exists and is not an export of cxrfast: choose another folder"):
        check_free(other)
    copy = shutil.copytree(out, tmp_path / "copy")
    check_free(copy)
    (copy / "README.md").write_text((copy / "README.md").read_text() + "by me")
    with pytest.raises(RunError, match=r"copy is an export, but README\.md was changed or added since"):
        check_free(copy)
    added = shutil.copytree(out, tmp_path / "added")
    (added / "weights" / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match=r"added is an export, but weights/notes\.txt was changed or added since"):
        check_free(added)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="file is a file, and an export is a folder"):
        check_free(tmp_path / "file")
    (tmp_path / "link").symlink_to(out)
    with pytest.raises(RunError, match="link is a link, and an export is not written where it leads"):
        check_free(tmp_path / "link")


def test_an_export_that_fails_leaves_the_earlier_one_as_it_was(study, tmp_path, monkeypatch):
    runs = Run.find(study)
    model = export(select(runs, scales=[32], folds=[0]), tmp_path / "model")
    before = {name: (model / name).read_bytes() for name in files_in(model)}

    def fails(*given: object) -> None:
        raise RunError("resnet50 as onnx differs")

    monkeypatch.setattr(module, "card_text", fails)
    with pytest.raises(RunError, match="differs"):
        export(select(runs, scales=[64]), model)
    assert {name: (model / name).read_bytes() for name in files_in(model)} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_command_exports_all_runs_those_of_a_scale_or_one(study, tmp_path):
    for number, runs in enumerate([study, study / "mobilenet_v3_small-32", study / "mobilenet_v3_small-64" / "fold-1"]):
        model = tmp_path / str(number)
        done = CliRunner().invoke(cli, ["export", str(runs), str(model), "--fold", "1"])
        assert done.exit_code == 0, done.output
        assert f"model: {model}" in done.output
        assert len(cxrfast.load(model).members) == (2, 1, 1)[number]


def test_the_command_refuses_in_one_line_with_exit_code_2(study, tmp_path):
    for arguments, message in (
        ([str(tmp_path), str(tmp_path / "m")], "no runs in "),
        ([str(study), str(tmp_path / "m"), "--scale", "99"], "no run has scale 99: there are 32, 64"),
        ([str(study), str(study)], "exists and is not an export of cxrfast"),
    ):
        done = CliRunner().invoke(cli, ["export", *arguments])
        assert (done.exit_code, done.output.count("\n")) == (2, 1)
        assert message in done.output
