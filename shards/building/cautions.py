"""What to know about a set before training on it, as lines of a report.

Cautions are about its rows: shared patients, a split without a part, blank labels, changed tables. Remarks are about its
images.
"""

import shlex
from collections.abc import Iterable, Mapping, Sequence

import pandas as pd

from cxrfast.shards.format.info import SetInfo
from cxrfast.shards.format.manifest import ShardManifest, source_hashes
from cxrfast.shards.format.rows import kept_names, label_names
from cxrfast.shards.images.remark import Remark
from cxrfast.shards.sources.parts import SPLITS
from cxrfast.splits import shared_patients

GROUPS = 3
"""Groups of equal images that the sentence names."""

# Rows


def cautions(info: SetInfo, rows: pd.DataFrame, label_like: Sequence[str] = ()) -> list[str]:
    """Sentences for the report of a build and for `describe`; they name images by row. [] if there is nothing to say.

    `label_like`: columns of the source's tables that look like labels, if no label was named.
    """
    patients = rows["patient_id"].tolist()
    found = [
        f"{what}: {shared.in_words(lambda row: f'row {row}')}; `cxrfast train` refuses it without --allow-shared-patients"
        for what, parts in (("official split", rows["split"]), ("folds", "fold " + rows["fold"].astype(str)))
        if (what != "folds" or info.own_folds)  # the set's own are dealt by patient
        and (shared := shared_patients(patients, parts.tolist()))
    ]
    lacking = [part for part in SPLITS if not rows["split"].eq(part).any()]
    if info.source_options.get("split_column") and not info.own_folds and lacking:
        found.append(
            f"official split: no image is in {' or '.join(lacking)}; `cxrfast train` needs {', '.join(SPLITS)}, or --split folds"
        )
    if not info.labels:
        found.append(_unlabelled(label_like))
    if blank := [name for name in info.labels if rows[name].isna().all()]:
        found.append(
            f"blank for every image: {', '.join(blank)}; such a label is trained as negative everywhere, unless "
            "`cxrfast train --blank LABEL=ignore` leaves it out of the loss"
        )
    return found + doubtful_patients(rows)


def _unlabelled(label_like: Sequence[str]) -> str:
    what = "no labels, so `cxrfast train` refuses this set; `cxrfast relabel` can add some later"
    options = " ".join(f"--label {shlex.quote(name)}" for name in label_like)
    return f"{what}. These columns look like labels: {options}" if options else what


def doubtful_patients(rows: pd.DataFrame) -> list[str]:
    """Sentences on patients who may be too few or too many: all images of one, or names that differ only in case."""
    unique = rows["patient_id"].drop_duplicates()
    if len(unique) == 1 < len(rows):
        return [
            f"all {len(rows):,} images are of one patient, so nothing is left to test on: is the column of patients right?"
        ]
    plain = unique.str.casefold()
    if (twice := plain.duplicated(keep=False)).any():
        first = rows["row"][unique.index[plain == plain[twice].iloc[0]]].tolist()
        return [
            f"{int(twice.sum()):,} patients have ids that differ from another's only in capital letters (first: rows "
            f"{' and '.join(map(str, first))}): they are taken for different people, who may be in different folds"
        ]
    return []


def kept(info: SetInfo, there: pd.DataFrame, planned: pd.DataFrame) -> list[str]:
    """Sentences on what an existing set keeps although its source's tables say something else now; [] if they agree.

    `there`: its rows; `planned`: the rows that the tables would give, the same images in the same order.
    """
    labels = [] if info.labels_from else sorted({*info.labels, *label_names(planned)})
    found, advice = [], []
    for what, names, how in (
        ("other labels", labels, "`cxrfast relabel` replaces labels"),
        ("another split", ["split"], "a new split needs a new --out"),
        ("other kept columns", sorted({*kept_names(there), *kept_names(planned)}), "new kept columns need a new --out"),
        ("other views", ["view"], "new views need a new --out"),
        ("other studies", ["study_id"], "new studies and paths need a new --out"),
        ("other paths", ["path"], "new studies and paths need a new --out"),
    ):
        before, now = (rows.reindex(columns=names).astype(object) for rows in (there, planned))
        differs = (before != now) & (before.notna() | now.notna())
        if other := there["row"][differs.any(axis=1)].tolist():
            found.append(f"{what} for {len(other):,} image{'s' * (len(other) > 1)} (first: row {other[0]})")
            advice.append(how)
    if not found:
        return []
    return [
        f"the tables now give {', '.join(found)}, and the set keeps what it was built with: {', '.join(dict.fromkeys(advice))}"
    ]


def hashes_by_row(manifests: Iterable[ShardManifest]) -> dict[int, bytes]:
    """{row held: hash of its source image}; without rows of manifests that hold no hashes."""
    found: dict[int, bytes] = {}
    for m in manifests:
        found |= source_hashes(m)
    return found


def copies_in_words(hashes: dict[int, bytes], rows: pd.DataFrame) -> list[str]:
    """A sentence if different patients have the same image, else []; it names images by row.

    `hashes`: from `hashes_by_row`; `rows`: the table of the set, in the order of its rows.
    """
    held = pd.DataFrame({"row": list(hashes), "hash": list(hashes.values())}).sort_values("row")
    held = held[held["hash"].duplicated(keep=False)]
    held["patient"] = rows["patient_id"].to_numpy(object)[held["row"].to_numpy(int)]
    shared = held[held.groupby("hash")["patient"].transform("nunique") > 1]
    if shared.empty:
        return []
    groups = [group.drop_duplicates("patient")["row"].tolist() for _, group in shared.groupby("hash", sort=False)]
    shown = "; ".join(" and ".join(f"row {row}" for row in group[:GROUPS]) for group in groups[:GROUPS])
    more = "; and others" if len(groups) > GROUPS else ""
    return [
        f"the same image under different patients: {len(shared):,} images have source files that are equal byte for byte, such "
        f"as {shown}{more}; if these are one patient, a model is tested on images that it was trained on"
    ]


# Images


SHOWN = 5
"""Rows named for each remark."""

ADVICE = {
    Remark.UNIFORM.value: "they show nothing; look at their source images",
    Remark.NARROW_PNG.value: "with --grey mimic or --grey window, a new set uses it all",
}
"""What to do, where something can be done."""


def by_remark(remarks: Mapping[int, Sequence[str]]) -> dict[str, list[int]]:
    """{row: remarks} → {remark: its rows, ascending}, most frequent first."""
    rows: dict[str, list[int]] = {}
    for row in sorted(remarks):
        for remark in remarks[row]:
            rows.setdefault(remark, []).append(row)
    return dict(sorted(rows.items(), key=lambda item: (-len(item[1]), item[0])))


def rows_in_words(rows: Sequence[int]) -> str:
    """`row 3`, or `rows 3, 7, …`."""
    some = ", ".join(map(str, rows[:SHOWN])) + (", …" if len(rows) > SHOWN else "")
    return f"row{'s' if len(rows) > 1 else ''} {some}"


def remark_lines(remarks: Mapping[int, Sequence[str]]) -> list[str]:
    """One line for each remark on the images of a set."""
    return [
        f"{len(rows):,} image{'s' if len(rows) > 1 else ''}: {_advised(remark)} ({rows_in_words(rows)})"
        for remark, rows in by_remark(remarks).items()
    ]


def sample_lines(counts: Mapping[str, int], sampled: int) -> list[str]:
    """One line for each remark on `sampled` images."""
    most_first = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [f"{n:,} of {sampled:,} sampled images: {_advised(remark)}" for remark, n in most_first]


def _advised(remark: str) -> str:
    return f"{remark}; {ADVICE[remark]}" if remark in ADVICE else remark
