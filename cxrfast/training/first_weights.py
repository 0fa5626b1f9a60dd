"""First weights of a run: their file, where they come from, and whether the run may start from them.

A configuration comes in; a file and its origin go out, or an error that says which patients the weights may have seen.
"""

from dataclasses import replace
from pathlib import Path

import pandas as pd

from cxrfast.config import TrainConfig
from cxrfast.errors import RunError
from cxrfast.files import sha256
from cxrfast.models.weights import fetch_weights
from cxrfast.runs.folder import WEIGHTS, RunFolder
from cxrfast.runs.lineage import Origin
from cxrfast.runs.run import Run


def weights_file(config: TrainConfig) -> Path | None:
    """File of the first weights (ImageNet's are downloaded once); None for `--weights none`. Raises RunError if absent."""
    if config.weights == "none":
        return None
    if config.weights == "imagenet":
        return fetch_weights(config.arch)
    given = Path(config.weights)
    path = RunFolder(given).weights_path if given.is_dir() else given
    if not path.exists():
        raise RunError(
            f"--weights {given}: {path} does not exist; use imagenet, none, a .pth or .safetensors file, or a run"
        )
    return path


def origin_of_weights(config: TrainConfig, path: Path | None) -> Origin:
    """Where the first weights in `path`, as `weights_file` returns it, come from."""
    if path is None:
        return Origin(kind="none")
    folder = path.resolve().parent
    if config.weights == "imagenet":
        origin = Origin(kind="imagenet")
    elif RunFolder(folder).is_started:
        origin = Run.open(folder).as_origin()
    else:
        origin = Origin(kind="file")
    return replace(origin, file=path.name, sha256=sha256(path))


def refuse_other_fold(config: TrainConfig, rows: pd.DataFrame | None = None) -> None:
    """Raises RunError if the run with the first weights may have trained on validation or test patients of this one.

    `rows`: this run's table, if it is known; two sets may differ in their official split alone.
    """
    if not RunFolder(Path(config.weights)).is_started:
        return
    run = Run.open(Path(config.weights))
    parent = run.config
    if parent.set_id != config.set_id:
        raise RunError(
            f"--weights {config.weights} was trained on set {parent.set_id}, whose training rows may hold patients of "
            f"this run's validation and test parts (set {config.set_id}): start from a run on the same set, or give the "
            f"path of its {WEIGHTS} if you know that its patients are different"
        )
    if (parent.fold, parent.split) != (config.fold, config.split):
        raise RunError(
            f"--weights {config.weights} was trained on {parent.split} fold {parent.fold}, whose training rows hold patients "
            f"of this run's validation and test parts ({config.split} fold {config.fold}): start from a run of the same fold"
        )
    if rows is not None and not config.allow_shared_patients:
        theirs = run.rows()
        trained = theirs.loc[theirs["part"] == "train", "patient_id"]
        seen = rows[(rows["part"] != "train") & rows["patient_id"].isin(trained)]
        if len(seen):
            raise RunError(
                f"--weights {config.weights} was trained on {seen['patient_id'].nunique():,} patients of this run's validation "
                f"and test parts, such as that of row {seen['row'].iloc[0]}: start from a run of the same split"
            )
