"""Loads a folder that `cxrfast export` wrote. It may come from elsewhere: all of it is checked, and nothing in it is executed.

In: model.json, the weights, and their hashes in SHA256SUMS. Out: a ScaleEnsemble. Other files of the folder are not read.
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from cxrfast.errors import RunError
from cxrfast.exports.description import (
    AGAIN,
    MODEL,
    SUMS,
    WEIGHTS,
    Description,
    MemberDescription,
    parse_description,
)
from cxrfast.files import read_file
from cxrfast.inference.ensemble import Member, ScaleEnsemble
from cxrfast.models.classifier import Classifier
from cxrfast.models.precision import inference_precision
from cxrfast.models.weights_file import read_weights_file
from cxrfast.runs.folder import LARGEST_TEXT

LINE = re.compile(r"([0-9a-f]{64}) [ *]([^\n\\]+)")
"""A line of SHA256SUMS, as `sha256sum` writes it."""


def load(folder: str | Path, device: torch.device | str = "cpu") -> ScaleEnsemble:
    """The model that `cxrfast export` wrote into `folder`, on the device, in evaluation mode.

        model = cxrfast.load("model")
        model.predict(["film.png", "another.dcm"])  # one line per film

    On the same machine, with the same versions, its logits are bitwise those of the runs that were exported.

    Raises RunError naming the file and what is wrong with it, if one is missing, damaged, changed since the export, or not
    what an export holds.
    """
    folder = Path(folder)
    if not (folder / MODEL).exists():
        raise RunError(f"{folder} is not an exported model (no {MODEL}): give the folder that `cxrfast export` wrote")
    sums = read_sums(folder)
    description = read_description(folder, sums)
    where = torch.device(device)
    return ScaleEnsemble(
        labels=description.labels,
        recipe=description.image_recipe,
        members=[_member(folder, sums, member, len(description.labels), where) for member in description.members],
        weights={int(fold): np.array(weights) for fold, weights in description.weights.items()},
        thresholds=description.ensemble_thresholds,
        reference=description.films_reference,
    )


def read_sums(folder: Path) -> dict[str, str]:
    """{relative path: sha256} of SHA256SUMS. Raises RunError if it is missing or damaged."""
    path = folder / SUMS
    try:
        lines = read_file(path, LARGEST_TEXT).decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{path} is missing or damaged ({_words(error)}): {AGAIN}") from error
    found = [LINE.fullmatch(line) for line in lines]
    if wrong := [number for number, match in enumerate(found, 1) if not match]:
        raise RunError(f"{path} is damaged (line {wrong[0]} is not a hash and the name of a file): {AGAIN}")
    return {match[2]: match[1] for match in found if match}


def read_description(folder: Path, sums: Mapping[str, str]) -> Description:
    """What model.json holds. Raises RunError if it is damaged, or not the file that SHA256SUMS lists."""
    path = folder / MODEL
    try:
        data = read_file(path, LARGEST_TEXT)
    except OSError as error:
        raise RunError(f"{path} {_words(error)}: {AGAIN}") from error
    _check_sum(path, MODEL, hashlib.sha256(data).hexdigest(), sums)
    return parse_description(data, path)


def _member(
    folder: Path, sums: Mapping[str, str], member: MemberDescription, outputs: int, device: torch.device
) -> Member:
    """A network with its weights, on the device."""
    name = f"{WEIGHTS}/{member.stem}.safetensors"
    path = folder / name
    if not path.exists():
        raise RunError(f"{path} is missing: {AGAIN}")
    file = read_weights_file(path)
    _check_sum(path, name, file.sha256, sums)
    if wrong := [name for name, tensor in file.tensors.items() if not tensor.isfinite().all()]:
        raise RunError(f"{path}: {wrong[0][:80]} holds NaN or infinite values: {AGAIN}")
    network = Classifier(member.arch, outputs, side=member.scale)
    try:
        network.load_state_dict(file.tensors)
    except RuntimeError as error:
        why = str(error).splitlines()[1:2] or [str(error)]
        raise RunError(f"{path} does not fit {member.arch} ({why[0].strip()[:200]}): {AGAIN}") from error
    return Member(
        name=member.name,
        scale=member.scale,
        fold=member.fold,
        network=network.to(device).eval(),
        precision=inference_precision(member.precision, device),
        micro_batch=member.micro_batch,
        thresholds=member.own_thresholds,
    )


def _check_sum(path: Path, name: str, found: str, sums: Mapping[str, str]) -> None:
    if name not in sums:
        raise RunError(f"{path} is not listed in {SUMS}: {AGAIN}")
    if sums[name] != found:
        raise RunError(f"{path} was changed or damaged since the export (its hash is not that in {SUMS}): {AGAIN}")


def _words(error: OSError | UnicodeDecodeError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
