"""Which runs make an ensemble, and how the images of their training set were made."""

import logging
from collections.abc import Sequence
from pathlib import Path

from cxrfast.analysis.join import by_name, names_to_combine
from cxrfast.analysis.scores import folds_text, left_out_note, shared_folds
from cxrfast.errors import RunError, ShardError
from cxrfast.runs.reference import Reference, merged, read_reference
from cxrfast.runs.remarks import unfinished
from cxrfast.runs.run import Run
from cxrfast.shards.format.info import read_set
from cxrfast.shards.format.recipe import ImageRecipe

log = logging.getLogger(__name__)


def choose_members(runs: Sequence[Run]) -> dict[str, dict[int, Run]]:
    """Groups by scale: name → fold → run, each with the same folds. Says in the log what is left out.

    Raises RunError if it is unclear which groups are meant, or if they share no fold.
    """
    if not runs:
        raise RunError("an ensemble needs one run or more")
    names = list(dict.fromkeys(run.folder.parent.name for run in runs))
    chosen = names
    if len(names) > 1:
        chosen = names_to_combine(runs, "the choice of runs")
        if not chosen:
            raise RunError(
                f"the runs are of several architectures with one scale each ({', '.join(names)}): give those of one"
            )
    groups = by_name(run for run in runs if run.folder.parent.name in chosen)
    groups = dict(sorted(groups.items(), key=lambda item: next(iter(item[1].values())).config.scale))
    folds = shared_folds(groups)
    if not folds:
        held = "; ".join(f"{name}: {folds_text(group)}" for name, group in groups.items())
        raise RunError(f"no fold has all scales ({held}): train and predict the missing ones")
    if others := [name for name in names if name not in chosen]:
        log.info(f"left out, of another architecture with one scale: {', '.join(others)}")
    if note := left_out_note({n: sorted(rest) for n, g in groups.items() if (rest := set(g) - set(folds))}, "scale"):
        log.info(note)
    found = {name: {fold: group[fold] for fold in folds} for name, group in groups.items()}
    for run in (run for group in found.values() for run in group.values()):
        if state := unfinished(run):
            log.warning(f"{run.name} is unfinished ({state}): its answers are those of the best epoch so far")
    return found


def recipe_of(runs: Sequence[Run], shards: Path | None = None) -> ImageRecipe:
    """How the images of the runs' set were made: as `cxrfast predict` recorded it, else from the set where it is, or in `shards`.

    Raises RunError if it is not there.
    """
    for run in runs:
        if (known := read_reference(run)) and not shards:
            return known[1]
    for folder in dict.fromkeys([shards] if shards else [run.shards for run in runs]):
        try:
            info = read_set(folder)
        except (ShardError, OSError):
            continue
        if info.id == runs[0].config.set_id:
            return info.recipe
    raise RunError(
        f"how the images of set {runs[0].config.set_id} were made is not known: its set.json is not in {shards or runs[0].shards} "
        "any more; give the set's folder with --shards"
    )


def reference_of(runs: Sequence[Run]) -> Reference | None:
    """What the training set's films look like at the lowest scale; None, said in the log, if no run tells."""
    lowest = min(run.config.scale for run in runs)
    known = [found[0] for run in runs if run.config.scale == lowest and (found := read_reference(run)) and found[0]]
    if not known:
        log.warning(
            "whether films are unlike the training set is not assessed: the runs have no reference, or too few validation "
            "films; runs of an earlier version get one by `cxrfast predict RUNS`"
        )
    return merged(known) if known else None
