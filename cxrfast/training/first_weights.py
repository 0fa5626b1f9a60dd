"""First weights of a run: where they come from, whether the run may start from them, and what it takes over.

A configuration comes in; a model that holds the weights and their origin go out, or an error that says which patients the
weights may have seen.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pandas as pd

from cxrfast.config import TrainConfig
from cxrfast.errors import RunError
from cxrfast.models.classifier import Classifier
from cxrfast.models.weights import fetch_weights, load_weights
from cxrfast.models.weights_file import WeightsFile, read_weights_file
from cxrfast.runs.folder import RunFolder
from cxrfast.runs.lineage import Difference, Origin, differs_in
from cxrfast.runs.run import Run

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FirstWeights:
    """Weights to start from, and where they come from."""

    option: str
    """The value of --weights."""
    origin: Origin
    file: WeightsFile | None = None
    """None: the model stays random."""
    run: Run | None = None
    """The run in whose folder the file is."""

    @classmethod
    def find(cls, config: TrainConfig) -> "FirstWeights":
        """Read what `--weights` names; ImageNet's are downloaded once. Raises RunError if it cannot be used."""
        if config.weights == "none":
            return cls("none", Origin(kind="none"))
        if config.weights == "imagenet":
            file = read_weights_file(fetch_weights(config.arch))
            return cls("imagenet", Origin(kind="imagenet", file=file.name, sha256=file.sha256), file)
        path = weights_path(config)
        try:
            file = read_weights_file(path)
            folder = RunFolder(path.resolve().parent)
            run = Run.open(folder.folder) if folder.is_started else None
            if run and file.config_hash not in (None, run.hash):
                run = None  # copied from another run
            return cls(config.weights, replace(_origin(file, run), file=file.name, sha256=file.sha256), file, run)
        except RunError as error:
            raise RunError(_of_option(config.weights, error)) from error

    def load_into(self, model: Classifier, config: TrainConfig) -> None:
        """Take the weights over into `model`, and log what becomes of its last layer. Raises RunError if they do not fit."""
        if self.file is None:
            return
        try:
            taken = load_weights(model, self.file, config.labels, self.origin.labels)
        except RunError as error:
            raise RunError(_of_option(self.option, error)) from error
        is_expected = self.origin.kind == "imagenet" or taken == list(config.labels)
        log.log(
            logging.INFO if is_expected else logging.WARNING,
            f"--weights {self.option}: {self._head(config.labels, taken)}",
        )
        if self.run and not self.run.is_done:
            log.warning(f"--weights {self.option}: that run has not finished; these are its weights so far")

    def _head(self, labels: Sequence[str], taken: Sequence[str]) -> str:
        """What becomes of the outputs of `labels`, of which `taken` were taken over."""
        theirs = self.origin.labels
        if self.origin.kind == "imagenet":
            return "the last layer starts at random, since ImageNet has other classes"
        if theirs is None:
            return "the last layer starts at random, since the file does not name the findings of its outputs"
        new = [label for label in labels if label not in taken]
        unused = [label for label in theirs if label not in taken]
        return "; ".join(
            [
                f"the last layer is taken over by name, {len(taken)} of {len(labels)} findings",
                *([f"{', '.join(new)} starts at random"] if new else []),
                *([f"{', '.join(unused)} of the file is not used"] if unused else []),
            ]
        )

    def refuse_seen_patients(self, config: TrainConfig, division: str | None, rows: pd.DataFrame) -> None:
        """Raises RunError if the weights may have been trained on validation or test patients of the run to start.

        `division`: of its set, see `shards.parts.division`; `rows`: its table. With --allow-shared-patients it is only logged.
        """
        if not (found := self._seen(config, division, rows)):
            return
        why, advice = found
        if not config.allow_shared_patients:
            raise RunError(
                f"--weights {self.option} {why}: {advice}, or, if you know that it saw none of them or accept it, add "
                "--allow-shared-patients; tables then say so"
            )
        log.warning(f"--weights {self.option} {why}: continuing, with --allow-shared-patients")

    def _seen(self, config: TrainConfig, division: str | None, rows: pd.DataFrame) -> tuple[str, str] | None:
        """Why the weights may know validation and test patients, and what to do instead; None if they do not."""
        own = Origin(kind="run", set_id=config.set_id, fold=config.fold, split=config.split, division=division)
        for link in self.origin.runs:
            difference = differs_in(link, own) or ("patients" if link.shared_patients else None)
            is_at_hand = link is self.origin and self.run is not None
            if difference is None or (difference in ("division", "patients") and is_at_hand):
                continue  # of a run that is at hand, rows tell more
            what, advice = _in_words(difference, link, own)
            return (what if link is self.origin else f"started from {link.run or 'a run'}, which {what}"), advice
        if self.run is None:
            return None
        theirs = self.run.rows()
        trained = theirs.loc[theirs["part"] == "train", "patient_id"]
        seen = rows[(rows["part"] != "train") & rows["patient_id"].isin(trained)]
        if not len(seen):
            return None
        what = f"was trained on {seen['patient_id'].nunique():,} patients of this run's validation and test parts"
        return f"{what}, such as that of row {seen['row'].iloc[0]}", "start from a run of the same split"


def _of_option(weights: str, error: RunError) -> str:
    """Message of an error about `--weights`, which names a path once."""
    return f"--weights {error}" if str(error).startswith(weights) else f"--weights {weights}: {error}"


def weights_path(config: TrainConfig) -> Path:
    """File that `--weights` names by a path. Raises RunError if there is none."""
    given = Path(config.weights)
    folder = RunFolder(given)
    path = folder.weights_path if given.is_dir() else given
    if path.exists():
        return path
    if given.is_dir() and folder.is_started:
        raise RunError(f"--weights {given}: that run has no {path.name} yet: train it first")
    raise RunError(f"--weights {path} does not exist; use imagenet, none, a .pth or .safetensors file, or a run")


def _origin(file: WeightsFile, run: Run | None) -> Origin:
    """Where a file of weights comes from; `run`: in whose folder it is."""
    if file.record:
        return Origin.from_json(file.record)
    if run is not None:
        return run.as_origin()
    if file.config_hash is not None:  # of an earlier version, which recorded nothing else
        return Origin(kind="run", config_hash=file.config_hash)
    return Origin(kind="file")


def _part_in_words(split: str | None, fold: int | None) -> str:
    """The fold or split of a run, for a message."""
    return f"the {split} split" if split == "official" else f"fold {fold}"


def _in_words(difference: Difference | Literal["patients"], link: Origin, own: Origin) -> tuple[str, str]:
    """What a run was trained on that another may not have seen, and what to do instead."""
    parts = "this run's validation and test parts"
    match difference:
        case "set":
            what = (
                f"was trained on set {link.set_id}, whose training rows may hold patients of {parts} (set {own.set_id})"
            )
            return what, "start from a run on the same set"
        case "fold" | "split":
            theirs, ours = (_part_in_words(one.split, one.fold) for one in (link, own))
            what = f"was trained on {theirs}, whose training rows hold patients of {parts} ({ours})"
            return what, "start from a run of the same fold"
        case "division":
            what = f"was trained when this set was split into other parts, so it may have seen patients of {parts}"
            return what, "start from a run of the same split"
        case "patients":
            what = f"was trained with --allow-shared-patients, so its training rows may hold patients of {parts}"
            return what, "start from a run that was trained without it"
        case "unknown":
            what = f"comes from an earlier version, which did not write down the set and fold, so it may have seen patients of {parts}"
            return what, "give the folder of its run"
