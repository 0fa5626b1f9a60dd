"""A run's thresholds on disk: thresholds.json, with the configuration, findings and validation rows that they belong to."""

import json
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal, TypedDict

from cxrfast.errors import RunError
from cxrfast.files import read_file, write_json
from cxrfast.runs.folder import LARGEST_TEXT
from cxrfast.runs.records import checked
from cxrfast.thresholds import YOUDEN, Count, Rule, Thresholds, ThresholdsJson

if TYPE_CHECKING:
    from cxrfast.runs.run import Run


class ThresholdsFile(TypedDict):
    """thresholds.json."""

    config_hash: str
    set_id: str
    part: Literal["val"]
    """Thresholds are chosen on validation rows, and on no others."""
    rows: Count
    """Number of validation rows."""
    labels: list[str]
    """Findings, in the order of the lists of `thresholds`."""
    thresholds: ThresholdsJson


def write_thresholds(run: "Run", thresholds: Thresholds, rows: int) -> None:
    """Replace the run's thresholds. rows: number of its validation rows, on which they were chosen."""
    run.check_lease()
    content: ThresholdsFile = {
        "config_hash": run.hash,
        "set_id": run.config.set_id,
        "part": "val",
        "rows": rows,
        "labels": list(run.config.labels),
        "thresholds": thresholds.json(),
    }
    write_json(run.thresholds_path, content)


def read_thresholds(run: "Run") -> Thresholds | None:
    """The run's thresholds; None if none were chosen yet. Raises RunError if they are damaged or another run's."""
    path = run.thresholds_path
    if not os.path.lexists(path):
        return None
    again = "delete it, then choose thresholds again with `cxrfast thresholds RUNS`"
    try:
        content = checked(json.loads(read_file(path, LARGEST_TEXT)), ThresholdsFile)
        thresholds = Thresholds.from_json(content["thresholds"])
    except (OSError, ValueError, RecursionError, RunError) as error:
        raise RunError(f"{path} is damaged ({error}): {again}") from error
    if (content["config_hash"], content["set_id"]) != (run.hash, run.config.set_id):
        raise RunError(f"{path} belongs to another run: {again}")
    if tuple(content["labels"]) != run.config.labels or len(thresholds.logits) != len(run.config.labels):
        raise RunError(f"{path} is about other findings than the run: {again}")
    return thresholds


def shared_rule(runs: Iterable["Run"]) -> Rule:
    """The rule by which the thresholds of all these runs were chosen; Youden's if none has any.

    Raises RunError if there are several, and as `read_thresholds` does.
    """
    found: dict[str, str] = {}
    for run in runs:
        if thresholds := run.read_thresholds():
            found.setdefault(str(thresholds.rule), run.name)
    if len(found) > 1:
        told = ", ".join(f"{rule} (such as {name})" for rule, name in found.items())
        raise RunError(
            f"thresholds were chosen by different rules: {told}; choose all by one with `cxrfast thresholds RUNS --rule …`"
        )
    return Rule.parse(*found) if found else YOUDEN
