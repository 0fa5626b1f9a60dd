"""A folder from elsewhere: whatever was changed in it, `load` names the file and the fault in one message, and runs nothing."""

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save

import cxrfast
from cxrfast.errors import RunError
from cxrfast.exports.export import export, select
from cxrfast.runs.run import Run

STEM = "mobilenet_v3_small-32-fold-0"


@pytest.fixture(scope="module")
def plain(study, tmp_path_factory) -> Path:
    """An export of one fold at two scales, safetensors only. Not to be written to."""
    return export(select(Run.find(study), folds=[0]), tmp_path_factory.mktemp("plain") / "model")


@pytest.fixture
def model(plain, tmp_path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(plain, tmp_path / "model"))


def sign(model: Path, name: str) -> None:
    """List a changed file with its hash of now, as someone would who made the folder."""
    sums = dict(reversed(line.split("  ")) for line in (model / "SHA256SUMS").read_text().splitlines())
    sums[name] = hashlib.sha256((model / name).read_bytes()).hexdigest()
    (model / "SHA256SUMS").write_text("".join(f"{digest}  {file}\n" for file, digest in sorted(sums.items())))


def rewrite(model: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change model.json and sign it."""
    value = json.loads((model / "model.json").read_text())
    change(value)
    (model / "model.json").write_text(json.dumps(value))
    sign(model, "model.json")


def refused(model: Path) -> str:
    """The message of `load`, one line."""
    with pytest.raises(RunError) as caught:
        cxrfast.load(model)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 700
    return message


def test_a_copy_loads_wherever_it_is_and_other_files_do_not_matter(model):
    (model / "README.md").write_text("edited")
    (model / "notes.txt").write_text("mine")
    assert len(cxrfast.load(model).members) == 2


def test_files_that_are_links_to_files_load_as_in_caches_of_model_hubs(model, tmp_path):
    blob = tmp_path / "blob"
    os.rename(model / f"weights/{STEM}.safetensors", blob)
    (model / f"weights/{STEM}.safetensors").symlink_to(blob)
    assert len(cxrfast.load(model).members) == 2


def test_a_folder_that_is_no_export_is_named(tmp_path):
    assert refused(tmp_path) == (
        f"{tmp_path} is not an exported model (no model.json): give the folder that `cxrfast export` wrote"
    )
    assert "absent is not an exported model" in refused(tmp_path / "absent")


@pytest.mark.parametrize("name", ["model.json", f"weights/{STEM}.safetensors"])
def test_a_changed_byte_is_found_by_the_hash(model, name):
    data = bytearray((model / name).read_bytes())
    data[-2] ^= 1
    (model / name).write_bytes(data)
    assert refused(model).startswith(
        f"{model / name} was changed or damaged since the export (its hash is not that in "
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("SHA256SUMS", "SHA256SUMS is missing or damaged (No such file or directory): restore the folder"),
        (f"weights/{STEM}.safetensors", f"weights/{STEM}.safetensors is missing: restore the folder"),
    ],
)
def test_a_missing_file_is_named(model, name, message):
    (model / name).unlink()
    assert message in refused(model)


@pytest.mark.parametrize("name", ["model.json", "SHA256SUMS", f"weights/{STEM}.safetensors"])
def test_a_pipe_is_refused_at_once(model, name):
    (model / name).unlink()
    os.mkfifo(model / name)
    assert "is not a regular file" in refused(model)


@pytest.mark.parametrize("name", ["model.json", f"weights/{STEM}.safetensors"])
def test_a_file_that_no_hash_vouches_for_is_refused(model, name):
    lines = (model / "SHA256SUMS").read_text().splitlines(keepends=True)
    (model / "SHA256SUMS").write_text("".join(line for line in lines if not line.endswith(f"  {name}\n")))
    assert refused(model).startswith(f"{model / name} is not listed in SHA256SUMS")


@pytest.mark.parametrize("line", ["0000  model.json", "\\" + 64 * "0" + "  a\\nb", 64 * "g" + "  model.json", "{}"])
def test_a_line_that_is_no_hash_is_named(model, line):
    text = (model / "SHA256SUMS").read_text()
    (model / "SHA256SUMS").write_text(text + line + "\n")
    number = text.count("\n") + 1
    assert f"SHA256SUMS is damaged (line {number} is not a hash and the name of a file)" in refused(model)


def members(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], object]:
    return lambda value: change(value["members"][0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.pop("schema"), "it has no schema version"),
        (lambda v: v.update(secret=1), "unknown field 'secret'"),
        (lambda v: v.pop("labels"), "missing required field `labels`"),
        (lambda v: v.update(labels=[]), "its labels are not one or more different names"),
        (lambda v: v.update(labels=["A"] * len(v["labels"])), "its labels are not one or more different names"),
        (lambda v: v["labels"].__setitem__(0, "a\x1b[31m"), "'a\\x1b[31m' holds the character U+001B"),
        (lambda v: v["labels"].__setitem__(0, 7), "Expected `str`, got `int` - at `$.labels[0]`"),
        (lambda v: v["labels"].pop(), "thresholds are not one for each label|not one for each finding and scale"),
        (lambda v: v.update(members=[]), "it has no networks"),
        (lambda v: v["members"].reverse(), "its networks are not every scale in every fold"),
        (lambda v: v["members"].append(v["members"][0]), "its networks are not every scale in every fold"),
        (members(lambda m: m.update(scale=-1)), "Expected `int` >= 1 - at `$.members[0].scale`"),
        (members(lambda m: m.update(scale=2**40)), "Expected `int` <= 2147483647 - at `$.members[0].scale`"),
        (members(lambda m: m.update(scale=7)), "--scale 7 is not between 8 and 4096 px"),
        (members(lambda m: m.update(scale=32.5)), "Expected `int`, got `float`"),
        (members(lambda m: m.update(fold=99)), "at `$.members[0].fold`"),
        (members(lambda m: m.update(name="../../etc/fold-0")), "is not the name of a network of fold 0"),
        (members(lambda m: m.update(name="/etc/passwd")), "is not the name of a network of fold 0"),
        (members(lambda m: m.update(name="a\0b/fold-0")), "holds the character U+0000"),
        (members(lambda m: m.update(precision="fp8")), "precision 'fp8' of mobilenet_v3_small-32/fold-0 is unknown"),
        (members(lambda m: m.update(micro_batch=0)), "at `$.members[0].micro_batch`"),
        (lambda v: v["weights"].pop("0"), "its weights are not those of its folds"),
        (lambda v: v["weights"]["0"].pop(), "weights of fold 0 are not one for each finding and scale"),
        (lambda v: v["weights"]["0"][0].append(0.0), "weights of fold 0 are not one for each finding and scale"),
        (
            lambda v: v["weights"]["0"].__setitem__(0, [2.0, -1.0]),
            "weights of fold 0 are negative, or their sum is not 1",
        ),
        (
            lambda v: v["weights"]["0"].__setitem__(0, [0.6, 0.6]),
            "weights of fold 0 are negative, or their sum is not 1",
        ),
        (lambda v: v["thresholds"]["logits"].pop(), "lists differ in length"),
        (lambda v: v["thresholds"].update(rule="best"), "'best' is not a rule for thresholds"),
        (lambda v: v["recipe"].update(resize="crop"), "resize 'crop' is unknown: use squash or pad"),
        (lambda v: v["recipe"].update(path="/etc"), "unknown field 'path'"),
        (lambda v: v["versions"].update(torch="2\n0"), "holds the character U+000A"),
    ],
)
def test_a_value_that_no_export_holds_is_named_although_its_hash_is_right(model, change, message):
    rewrite(model, change)
    found = refused(model)
    assert found.startswith(f"{model / 'model.json'} is damaged (")
    assert any(part in found for part in message.split("|"))


def test_an_export_of_another_version_is_not_called_damaged(model):
    rewrite(model, lambda value: value.update(schema=2))
    path = model / "model.json"
    assert refused(model) == f"{path} has schema version 2, this cxrfast reads 1: use the cxrfast that exported it"


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "null", '{"schema": NaN}', "[" * 100_000, "\udc80".encode("utf-8", "surrogateescape")]
)
def test_a_model_json_that_is_no_object_is_refused(model, text):
    (model / "model.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    sign(model, "model.json")
    assert refused(model).startswith(f"{model / 'model.json'} is damaged (")


def test_an_unknown_architecture_is_refused(model):
    rewrite(model, members(lambda m: m.update(arch="os:system")))
    assert "os:system" in refused(model)
    rewrite(model, members(lambda m: m.update(arch="squeezenet1_0")))
    assert f"{STEM}.safetensors does not fit squeezenet1_0 (Missing key(s) in state_dict" in refused(model)


def with_weights(model: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor] | None]) -> None:
    path = model / f"weights/{STEM}.safetensors"
    tensors = load_tensors(path.read_bytes())
    path.write_bytes(save(change(tensors) or tensors))
    sign(model, f"weights/{STEM}.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {"a": torch.zeros(1)}, "does not fit mobilenet_v3_small (Missing key(s) in state_dict"),
        (lambda t: t.update(extra=torch.zeros(1)), "does not fit mobilenet_v3_small (Unexpected key(s)"),
        (lambda t: t.update({"net.classifier.3.bias": torch.zeros(3)}), "size mismatch for net.classifier.3.bias"),
        (
            lambda t: t.update({"net.classifier.3.bias": t["net.classifier.3.bias"] * float("nan")}),
            "net.classifier.3.bias holds NaN or infinite",
        ),
    ],
)
def test_weights_that_do_not_fit_or_are_not_finite_are_refused(model, change, message):
    with_weights(model, change)
    found = refused(model)
    assert found.startswith(str(model / f"weights/{STEM}.safetensors"))
    assert message in found


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("how", [pickle.dumps, lambda trap: _torch_save(trap)])
def test_a_pickle_is_refused_and_not_executed(model, tmp_path, how):
    path = model / f"weights/{STEM}.safetensors"
    path.write_bytes(how(Trap(tmp_path / "executed")))
    sign(model, f"weights/{STEM}.safetensors")
    assert str(path) in refused(model)
    assert not (tmp_path / "executed").exists()


def _torch_save(value: object) -> bytes:
    import io

    file = io.BytesIO()
    torch.save({"model": value}, file)
    return file.getvalue()
