"""Writes trained networks into one folder that can be handed on: weights, other formats, what they need, and a model card.

In: runs with predictions, and the description of their shard set. Out: a folder that `load` reads, whole or not at all. None of
its files holds a path of this machine, or the id of a patient or an image.
"""

import json
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save

from cxrfast.errors import RunError
from cxrfast.exports.card.card import Facts, card_text
from cxrfast.exports.description import CARD, MODEL, SUMS, WEIGHTS, Description, MemberDescription
from cxrfast.exports.formats import FORMATS, SUFFIXES, Difference, check_libraries, export_network
from cxrfast.exports.load import load, read_sums
from cxrfast.files import replacing_folder, sha256, write_bytes
from cxrfast.inference.ensemble import Member, ScaleEnsemble
from cxrfast.machine import installed
from cxrfast.models.weights_file import RECORD
from cxrfast.progress import progress
from cxrfast.runs.remarks import unfinished
from cxrfast.runs.run import Run
from cxrfast.shards.format.checksums import sums_bytes
from cxrfast.shards.format.info import versions

log = logging.getLogger(__name__)


def export(runs: Sequence[Run], out: str | Path, *, formats: Collection[str] = (), shards: Path | None = None) -> Path:
    """Write the model of `runs` into the folder `out` and return its path; `load` reads it.

    The runs are those of one architecture, every scale in every fold, see `ScaleEnsemble.from_runs`. formats: more than
    safetensors, of `formats.FORMATS`; each network is compared with the original. shards: where the runs' set is now.

    An earlier export is replaced, if nobody changed it since. Raises RunError if `out` holds anything else, if the runs do not
    make a model, or if a network cannot be exported; then `out` stays as it was.
    """
    out = Path(out)
    check_free(out)
    check_libraries(formats)
    ensemble = ScaleEnsemble.from_runs(runs, "cpu", shards=shards)
    by_name = {run.name: run for run in runs}
    chosen = {member.name: by_name[member.name] for member in ensemble.members}
    description = describe(ensemble, chosen, formats)
    differences: dict[tuple[str, str], Difference | None] = {}
    steps = len(chosen) * (1 + len(set(formats))) + 1
    with replacing_folder(out) as folder, progress("export", steps, unit="files") as advance:
        for member, described in zip(ensemble.members, description.members, strict=True):
            write_weights(folder, member, described, chosen[member.name])
            advance(note=member.name)
            for kind in (kind for kind in FORMATS if kind in formats):
                exported = export_network(member.network, member.scale, kind, _record(ensemble, member))
                differences[member.name, kind] = exported.difference
                (folder / kind).mkdir(exist_ok=True)
                write_bytes(folder / kind / f"{described.stem}{SUFFIXES[kind]}", exported.data)
                advance(note=f"{member.name} {kind}")
        write_bytes(folder / MODEL, description.to_bytes())
        sizes = {name: (folder / name).stat().st_size for name in files_in(folder)}
        card = card_text(Facts(ensemble, description, chosen, differences, sizes))
        write_bytes(folder / CARD, card.encode())
        write_bytes(folder / SUMS, sums_bytes({name: sha256(folder / name) for name in files_in(folder)}))
        check_same(load(folder), ensemble)
        advance(note=CARD)
    for (name, kind), difference in differences.items():
        if difference is None:
            log.warning(f"{name} as {kind} was not compared with the original: onnxruntime is not installed")
    return out


def select(
    runs: Sequence[Run],
    *,
    scales: Collection[int] = (),
    folds: Collection[int] = (),
    names: Collection[str] = (),
    finished_only: bool = False,
) -> list[Run]:
    """The runs of these scales, folds and groups (none: all). Raises RunError for one that there is not."""
    chosen = list(runs)
    chosen = _matching(chosen, "scale", scales, lambda run: run.config.scale)
    chosen = _matching(chosen, "fold", folds, lambda run: run.config.fold)
    chosen = _matching(chosen, "name", names, lambda run: run.folder.parent.name)
    if finished_only:
        states = {run.name: unfinished(run) for run in chosen}
        if left := [name for name, state in states.items() if state]:
            log.info(f"left out, unfinished: {', '.join(left)}")
        chosen = [run for run in chosen if not states[run.name]]
        if not chosen:
            raise RunError("none of the runs is finished: finish the training, or leave out --finished-only")
    return chosen


T = TypeVar("T", int, str)


def _matching(runs: list[Run], what: str, wanted: Collection[T], of: Callable[[Run], T]) -> list[Run]:
    there = sorted({of(run) for run in runs})
    if missing := sorted(set(wanted) - set(there)):
        raise RunError(f"no run has {what} {missing[0]}: there are {', '.join(map(str, there))}")
    return [run for run in runs if not wanted or of(run) in wanted]


def check_free(out: Path) -> None:
    """Raises RunError unless `out` can be written: it is absent, empty, or an export as it was written."""
    other = "choose another folder, or move this one away"
    if out.is_symlink():
        raise RunError(f"{out} is a link, and an export is not written where it leads: {other}")
    if not out.exists():
        return
    if not out.is_dir():
        raise RunError(f"{out} is a file, and an export is a folder: {other}")
    there = files_in(out)
    if not there:
        return
    if not {MODEL, SUMS} <= set(there):
        raise RunError(f"{out} exists and is not an export of cxrfast: {other}")
    sums = read_sums(out)
    for name in there:
        if name != SUMS and (name not in sums or sha256(out / name) != sums[name]):
            raise RunError(f"{out} is an export, but {name} was changed or added since: {other}")


def files_in(folder: Path) -> list[str]:
    """Relative paths of everything in a folder that is not a folder itself; sorted."""
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()
    )


def describe(ensemble: ScaleEnsemble, runs: dict[str, Run], formats: Collection[str] = ()) -> Description:
    """What model.json says about an ensemble of `runs`, by name."""
    members = [
        MemberDescription(
            name=member.name,
            arch=member.network.arch,
            scale=member.scale,
            fold=member.fold,
            precision=runs[member.name].config.precision,
            micro_batch=member.micro_batch,
            config=shareable(runs[member.name]),
            origin=runs[member.name].origin.json(),
            thresholds=member.thresholds.json() if member.thresholds else None,
        )
        for member in ensemble.members
    ]
    return Description(
        labels=list(ensemble.labels),
        set_id=next(iter(runs.values())).config.set_id,
        recipe=asdict(ensemble.recipe),
        members=members,
        weights={str(fold): weights.tolist() for fold, weights in ensemble.weights.items()},
        thresholds=ensemble.thresholds.json() if ensemble.thresholds else None,
        reference=ensemble.reference.json() if ensemble.reference else None,
        versions=versions() | {name: installed(name, name) or "unknown" for name in _libraries(formats)},
    )


def _libraries(formats: Collection[str]) -> list[str]:
    onnx = ["onnx", "onnxscript", "onnxruntime"] if "onnx" in formats else []
    return ["torch", "torchvision", "safetensors", *onnx]


def shareable(run: Run) -> dict[str, Any]:
    """The configuration of a run as JSON values; of its first weights only the kind, since they may be a path."""
    return json.loads(json.dumps(asdict(run.config) | {"weights": run.origin.kind}))


def write_weights(folder: Path, member: Member, described: MemberDescription, run: Run) -> None:
    """A network's weights, with what they say about their run, as in best.safetensors."""
    (folder / WEIGHTS).mkdir(exist_ok=True)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in member.network.state_dict().items()}
    record = json.dumps(run.as_origin().json())
    write_bytes(folder / WEIGHTS / f"{described.stem}.safetensors", save(tensors, metadata={RECORD: record}))


def _record(ensemble: ScaleEnsemble, member: Member) -> dict[str, Any]:
    """What a file of another format says about itself."""
    return {
        "name": member.name,
        "arch": member.network.arch,
        "scale": member.scale,
        "fold": member.fold,
        "labels": list(ensemble.labels),
        "input": f"uint8 (N, 1, {member.scale}, {member.scale}), grey",
        "output": "logits",
        "recipe": asdict(ensemble.recipe),
    }


def check_same(loaded: ScaleEnsemble, ensemble: ScaleEnsemble) -> None:
    """Raises RunError unless what was read back is what was exported, to the bit."""
    theirs, ours = loaded.state_dict(), ensemble.state_dict()
    same = theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in ours)
    same &= loaded.labels == ensemble.labels and loaded.recipe == ensemble.recipe
    same &= loaded.thresholds == ensemble.thresholds and loaded.reference == ensemble.reference
    same &= all((loaded.weights[fold] == weights).all() for fold, weights in ensemble.weights.items())
    if not same:
        raise RunError("what was written is not what was read back: the disk may be faulty; try again elsewhere")
