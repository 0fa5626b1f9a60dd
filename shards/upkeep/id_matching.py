"""Match the ids of a table of labels with the ids of a set, as text.

Image and study ids are matched as text, files by the end of their paths. Nothing is guessed: leading zeros count, and
ambiguous ids stay unmatched or are refused.
"""

import re
import unicodedata

import pandas as pd

from cxrfast.errors import ShardError
from cxrfast.shards.sources.ids import normal_id
from cxrfast.shards.sources.image_files import SUFFIX
from cxrfast.shards.sources.tables.text_columns import lines

ID_COLUMNS = ("image_id", "study_id", "path")
"""Columns of the set that a table can be matched with."""


def best_column(ids: pd.Series, rows: pd.DataFrame) -> str:
    """The column of `ID_COLUMNS` with most of the table's `ids`."""

    def found(column: str) -> int:
        known = rows[column]
        return int(as_in_set(ids, known, shared_tail(ids, known)).isin(known).sum())

    return max(ID_COLUMNS, key=found)


def match_ids(ids: pd.Series, known: pd.Series, tail: int, what: str) -> pd.Series:
    """The table's `ids` as the column `known` of the set writes them; unknown ids stay as they are.

    `tail`: from `shared_tail`; `what`: names table and column in messages. Raises ShardError for ids that are listed twice
    or have lost their leading zeros.
    """
    ids = as_in_set(ids, known, tail)
    if repeated := ids[ids.duplicated()].drop_duplicates().tolist():
        more = f" and {len(repeated) - 3:,} more" if len(repeated) > 3 else ""
        raise ShardError(f"{what} lists {', '.join(repeated[:3])}{more} more than once: keep one line for each")
    if known.name != "path":
        _check_zeros(ids[~ids.isin(known)], known[~known.isin(ids)].dropna(), what)
    return ids


def _check_zeros(in_table: pd.Series, in_set: pd.Series, what: str) -> None:
    """Raises ShardError if unmatched ids of table and set differ only in leading zeros."""
    bare = in_set.str.lstrip("0")
    apart = in_table[in_table.str.lstrip("0").isin(bare)]
    if len(apart):
        whole = in_set[bare == apart.iloc[0].lstrip("0")].iloc[0]
        raise ShardError(
            f"{len(apart):,} ids of {what} differ from the set's only in leading zeros ({apart.iloc[0]} is {whole} "
            "there): write them as text, with their zeros"
        )


def as_in_set(ids: pd.Series, known: pd.Series, tail: int) -> pd.Series:
    """The ids as the set may write them: 50000014.0 or s50000014 as study 50000014 and 0001.png as image 0001, unless it has
    these ids."""
    if known.name == "path":
        whole = dict(zip(tails(known, tail), known, strict=True)) if tail else {}
        return pd.Series([whole.get(t, i) for t, i in zip(tails(ids, tail), ids, strict=True)], ids.index, dtype=object)
    exact, bare = ids.astype(object), ids.map(normal_id)
    if known.name == "study_id":  # MIMIC's folders are called s50000014
        bare = bare.where(bare.isin(known), bare.str.replace(r"^s(?=\d+$)", "", regex=True))
    found = exact.where(exact.isin(known), bare.astype(object))
    if known.name == "image_id":
        stem = bare.str.replace(SUFFIX, "", regex=True).astype(object)
        found = found.where(found.isin(known) | ~stem.isin(known), stem)
    return found


def check_patients(patients: pd.Series, ids: pd.Series, rows: pd.DataFrame, by: str, what: str) -> None:
    """Raises ShardError if the table gives an image or study to another patient of the set than the set does.

    `patients`: of the table, on the same lines as `ids`, which are as the set's column `by` writes them; `rows`: of the set.
    Patients that the set does not have may be another numbering, and say nothing.
    """
    of_id = dict(zip(rows[by], map(_bare_patient, rows["patient_id"]), strict=True))
    known = set(of_id.values())
    named = patients.map(_bare_patient, na_action="ignore")
    expected = ids.map(of_id)
    wrong = named.isin(known) & expected.notna() & (named != expected)
    if wrong.any():
        at = int(wrong.to_numpy().argmax())
        raise ShardError(
            f"{what} gives {by} {ids.iloc[at]} to the patient {patients.iloc[at]} in {lines(wrong.index[wrong])}, and the set to "
            f"{rows.loc[rows[by] == ids.iloc[at], 'patient_id'].iloc[0]}: correct the table, or accept this with --allow-unmatched if "
            "its patients are numbered otherwise; nothing was changed"
        )


def _bare_patient(text: str) -> str:
    """A patient without what copies of tables add or lose: MIMIC's `p`, leading zeros."""
    return re.sub(r"^p?0*(?=\d+$)", "", normal_id(text))


# Paths


def tails(paths: pd.Series, parts: int) -> list[str]:
    """The last `parts` parts of every path, or all if it has fewer; with slashes and in Unicode's form NFC."""
    plain = (unicodedata.normalize("NFC", path.strip().replace("\\", "/")) for path in paths)
    return ["/".join([p for p in path.split("/") if p not in ("", ".")][-parts:]) for path in plain]


def shared_tail(ids: pd.Series, known: pd.Series) -> int:
    """Number of trailing parts by which to match paths of table and set; 0 if they share none or are not paths.

    Leading folders are dropped one by one while the rest still distinguishes all paths of either side. Of these lengths,
    returns the longest one that matches the most images.
    """
    if known.name != "path":
        return 0
    sides = [column.drop_duplicates() for column in (ids.str.strip(), known)]
    best, most = 0, 0
    for parts in range(1 + max(int(side.str.count(r"[/\\]").max()) for side in sides), 0, -1):
        in_table, in_set = (set(tails(side, parts)) for side in sides)
        if len(in_table) < len(sides[0]) or len(in_set) < len(sides[1]):
            break
        if (found := len(in_table & in_set)) > most:
            best, most = parts, found
        if most == min(map(len, sides)):
            break
    return best
