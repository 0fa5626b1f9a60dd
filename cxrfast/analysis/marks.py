"""Signs that follow the names of groups in tables and figures, and the footnotes that explain them.

†: the first weights came from another run. ‡: a remark on one of its runs, see `runs.remarks`. Arrays in, text out.
"""

from collections.abc import Mapping

import pandas as pd

from cxrfast.analysis.scores import fold_numbers
from cxrfast.runs.lineage import group_origins, marked_name, origin_footnote

SIGN = "‡"
"""Follows the name of a group of runs with a remark."""


def origins(lines: pd.DataFrame) -> dict[str, str]:
    """By group: where the first weights came from. lines: with the columns name and start."""
    return group_origins(zip(lines["name"], lines["start"], strict=True))


def marked(names: Mapping[str, str], lines: pd.DataFrame) -> dict[str, str]:
    """Names of groups as tables show them (`names`, by group), with their signs. lines: name, start, fold, remark."""
    starts, remarked = origins(lines), {name for those in by_remark(lines).values() for name in those}
    return {
        name: marked_name(shown, starts[name]) + (SIGN if name in remarked else "") for name, shown in names.items()
    }


def footnotes(lines: pd.DataFrame) -> str:
    """Explanations of the signs, one paragraph each; empty if no name has one. lines: name, start, fold, remark."""
    remarks = [
        f"{remark}: {', '.join(f'{name} ({fold_numbers(folds)})' for name, folds in groups.items())}"
        for remark, groups in by_remark(lines).items()
    ]
    return "\n".join(
        filter(None, [origin_footnote(origins(lines)), f"{SIGN} {'; '.join(remarks)}." if remarks else ""])
    )


def by_remark(lines: pd.DataFrame) -> dict[str, dict[str, set[int]]]:
    """Folds by remark and group."""
    found: dict[str, dict[str, set[int]]] = {}
    for name, fold, remarks in lines[["name", "fold", "remark"]].drop_duplicates().itertuples(index=False):
        for remark in filter(None, remarks.split("; ")):
            found.setdefault(remark, {}).setdefault(name, set()).add(fold)
    return found


def group_remark(lines: pd.DataFrame) -> dict[str, str]:
    """By group: its remarks, each with the folds that have it."""
    told: dict[str, list[str]] = {}
    for remark, groups in by_remark(lines).items():
        for name, folds in groups.items():
            told.setdefault(name, []).append(f"{remark} ({fold_numbers(folds)})")
    return {name: "; ".join(told.get(name, [])) for name in lines["name"].unique()}
