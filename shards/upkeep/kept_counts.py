"""Tables of the columns that `--keep` carried along: values of text, quartiles of numbers, by split and fold.

A column that may identify patients is only named, unless the user asks for it.
"""

import re
from collections.abc import Collection, Iterator

import numpy as np
import pandas as pd

from cxrfast.errors import ShardError, did_you_mean
from cxrfast.shards.format.rows import KEPT, kept_names
from cxrfast.splits import FOLDS
from cxrfast.tables import Table
from cxrfast.text import shown

MOST_VALUES = 20
"""Values of text that a table lists."""

IDENTIFYING_WORDS = frozenset(
    [
        "id",
        "ids",
        "uid",
        "guid",
        "nr",
        "no",
        "num",
        "number",
        "nummer",
        "code",
        "key",
        "mrn",
        "pid",
        "ssn",
        "nhs",
        "ahv",
        "name",
        "names",
        "vorname",
        "nachname",
        "surname",
        "firstname",
        "lastname",
        "initials",
        "accession",
        "birth",
        "birthday",
        "birthdate",
        "born",
        "dob",
        "geburtsdatum",
        "geburtstag",
        "death",
        "dod",
        "date",
        "datum",
        "time",
        "datetime",
        "timestamp",
        "day",
        "address",
        "adresse",
        "street",
        "city",
        "zip",
        "zipcode",
        "postcode",
        "plz",
        "postal",
        "phone",
        "tel",
        "telefon",
        "email",
        "mail",
        "insurance",
        "versicherung",
        "physician",
        "doctor",
        "radiologist",
        "arzt",
        "reader",
        "operator",
        "comment",
        "comments",
        "report",
        "note",
        "notes",
        "text",
        "remark",
        "remarks",
        "befund",
        "file",
        "path",
        "filename",
        "admission",
        "fall",
        "fallnummer",
        "url",
        "serial",
    ]
)
IDENTIFYING_NAMES = ("patient", "subject", "case", "study", "image")
IDENTIFYING = re.compile(
    r"(?:birth|geburt|name$|names$|datum|date$|number|nummer|nr$|uid|address|adresse|accession|insurance|versicherung)",
    re.IGNORECASE,
)
"""Words of a column's name, whole names, and parts of words that say that its values may point to a person."""

LARGE = 1000
"""Whole numbers up to this one are taken for measurements, such as an age in months, and not for ids."""


def may_identify(name: str, values: pd.Series) -> bool:
    """Whether a kept column may identify patients: by its name, or because most of its texts or large whole numbers occur once."""
    words = re.findall(r"[^\W\d_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name))
    if name.strip().lower() in IDENTIFYING_NAMES or any(map(IDENTIFYING.search, words)):
        return True
    if any(word.lower() in IDENTIFYING_WORDS for word in words):
        return True
    counts = values.dropna().value_counts()
    is_rare = len(counts) > MOST_VALUES and bool((counts == 1).mean() > 0.5)
    if is_rare and values.dtype == np.float64:
        return bool((values.dropna() % 1 == 0).all() and values.max() > LARGE)
    return is_rare


def kept_tables(rows: pd.DataFrame, shown_too: Collection[str] = ()) -> list[Table]:
    """Tables of a set's kept columns; none without any. `shown_too`: columns to tabulate although they may identify patients.

    `rows`: rows.parquet. Raises ShardError for a name in `shown_too` that is not a kept column.
    """
    columns = {name.removeprefix(KEPT): rows[name] for name in kept_names(rows)}
    if absent := [name for name in shown_too if name not in columns]:
        known = ", ".join(columns) or "none"
        raise ShardError(
            f"--show {shown(absent[0])}: the set kept no such column: {did_you_mean(absent[:1], columns)}it kept: {known}"
        )
    hidden = [name for name, values in columns.items() if name not in shown_too and may_identify(name, values)]
    visible = {name: values for name, values in columns.items() if name not in hidden}
    groups = _groups(rows)
    text = {name: values for name, values in visible.items() if values.dtype != np.float64}
    numbers = {name: values for name, values in visible.items() if name not in text}
    tables = []
    if text:
        head = ["Column", "Value", "Images", "Patients", *(name for name in groups if name != "all")]
        lines = [line for name, values in text.items() for line in _values(name, values, rows["patient_id"], groups)]
        tables.append(Table(title="Kept columns of text", head=head, rows=lines, text=["Value"]))
    if numbers:
        head = ["Column", "Part", "Images", "Blank", "Median", "Quartiles", "Range"]
        lines = [line for name, values in numbers.items() for line in _quartiles(name, values, groups)]
        tables.append(Table(title="Kept columns of numbers", head=head, rows=lines, text=["Part"]))
    if hidden:
        lines = [[name, f"{int(columns[name].notna().sum()):,}"] for name in hidden]
        note = "They may identify patients, so their values are not shown; --show COLUMN shows them."
        tables.append(
            Table(title="Kept columns that are not tabulated", head=["Column", "Images"], rows=lines, note=note)
        )
    return tables


def _groups(rows: pd.DataFrame) -> dict[str, np.ndarray]:
    """Masks, bool (N,): all images, the parts of the official split if there is one, the folds."""
    found = {"all": np.ones(len(rows), bool)}
    found |= {
        part: mask for part in ("train", "validate", "test") if (mask := rows["split"].eq(part).to_numpy(bool)).any()
    }
    return found | {f"fold {fold}": rows["fold"].eq(fold).to_numpy(bool) for fold in range(FOLDS)}


def _values(name: str, values: pd.Series, patients: pd.Series, groups: dict[str, np.ndarray]) -> Iterator[list[str]]:
    """Lines of a column of text: its most frequent values, the others together, blank ones."""
    listed = values.value_counts().index[:MOST_VALUES].tolist()
    others = values.dropna().nunique() - len(listed)
    masks = {value: values.eq(value).to_numpy(bool, na_value=False) for value in listed}
    if others:
        masks[f"{others:,} other values"] = (values.notna() & ~values.isin(listed)).to_numpy(bool)
    if values.isna().any():
        masks["(blank)"] = values.isna().to_numpy(bool)
    for value, mask in masks.items():
        by_group = (f"{int((mask & group).sum()):,}" for key, group in groups.items() if key != "all")
        yield [name, value, f"{int(mask.sum()):,}", f"{patients[mask].nunique():,}", *by_group]


def _quartiles(name: str, values: pd.Series, groups: dict[str, np.ndarray]) -> Iterator[list[str]]:
    for group, mask in groups.items():
        mine = values[mask]
        line = [name, group, f"{int(mine.notna().sum()):,}", f"{int(mine.isna().sum()):,}"]
        if mine.notna().any():
            low, median, high = mine.quantile([0.25, 0.5, 0.75]).tolist()
            yield [*line, f"{median:.6g}", f"{low:.6g} to {high:.6g}", f"{mine.min():.6g} to {mine.max():.6g}"]
        else:
            yield [*line, "-", "-", "-"]
