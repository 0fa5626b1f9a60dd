"""Seeds → tables with a known truth, written in some dialect and damaged as editors, exports and transfers do it.

Left out is damage that nobody can see: after which a record by itself is valid RFC 4180 with the right number of fields.
Two such records may still be harmed together: a stray quote in one and a stray quote in a later one make a valid table.
"""

import gzip
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from cxrfast.labels import MIMIC

BAD_BYTE = "\ue000"
"""Becomes a byte that is not UTF-8 when the table is written."""

WORDS = ("left", "base", "opacity", "the 3 cm nodule", "80 bpm", "naïve", "clear", "(see above)", "St. n. OP", "肺炎")


@dataclass
class Record:
    """A record as it is written, and what it says."""

    fields: list[str]
    """With their quotes."""
    raw: str
    """All that is written, without the end of the line."""
    end: str
    text: list[str] | None
    """What the fields say, as text; None if it must not become a row."""
    meaning: list[str] | None
    """The same before damage that left a valid table."""
    harmed: bool = False
    """The table must be refused for it."""
    doubtful: bool = False
    """It is valid text, but a source may refuse what it says."""


@dataclass
class Table:
    """A written table."""

    name: str
    data: bytes
    header: list[str]
    labels: list[str]
    rows: dict[int, list[str]]
    """{line where a row starts: its text}."""
    meanings: dict[int, list[str]]
    harmed: set[int]
    """Lines that damage touches, if the table must be refused."""
    doubtful: set[int]
    """Lines for which a source may refuse it."""
    is_header_harmed: bool
    damages: list[str] = field(default_factory=list)
    delimiter: str = ","


def make(seed: int) -> Table:
    """The same seed gives the same table. One in six is undamaged."""
    rng = np.random.default_rng([1_014, seed])
    delimiter = str(rng.choice([",", ",", ";", "\t", "|"]))
    header, labels, texts = _truth(rng)
    everything = rng.random() < 0.3
    ends = str(rng.choice(["\n", "\n", "\r\n", "\r"]))

    def written(record: list[str]) -> Record:
        fields = [_quoted(text, delimiter, everything or rng.random() < 0.05) for text in record]
        return Record(fields, delimiter.join(fields), ends, record, record)

    records = [written(header), *map(written, texts)]
    records[0].text = records[0].meaning = None
    if rng.random() < 0.2:
        records[-1].end = ""
    damages = []
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
        for kind in rng.permutation(list(DAMAGES))[:10].tolist():
            if DAMAGES[kind](rng, records, delimiter, header):
                damages.append(kind)
                break
    return _rendered(rng, records, delimiter, header, labels, damages)


def _truth(rng: np.random.Generator) -> tuple[list[str], list[str], list[list[str]]]:
    """Header, labels and rows of text."""
    labels = [str(name) for name in rng.choice(MIMIC, rng.integers(1, 5), replace=False)]
    header = ["path", "patient_id", *labels, "split", "comment", *["Age, years"] * (rng.random() < 0.3)]
    order = rng.permutation(len(header)) if rng.random() < 0.5 else np.arange(len(header))
    patients = [_patient(rng, k, style) for style in [rng.integers(4)] for k in range(8)]
    values = str(rng.choice(["float", "whole"]))
    rows, is_plain = [], rng.random() < 0.3
    for k in range(rng.integers(1, 26)):
        patient = int(rng.integers(len(patients)))
        row = {
            "path": f"{('', 'images/', 'p1/s2/')[patient % 3]}i{k:03d}.{('jpg', 'png')[patient % 2]}",
            "patient_id": patients[patient],
            "split": ("train", "validate", "test", "")[patient % 4],
            "comment": str(rng.choice(WORDS)) if is_plain else _comment(rng),
            "Age, years": str(rng.integers(1, 99)),
        }
        some = {"float": ["1.0", "0.0", "-1.0", "", ""], "whole": ["1", "0", "0", "1", "-1"]}[values]
        row |= {label: str(rng.choice(some)) for label in labels}
        rows.append([row[header[i]] for i in order])
    part = [header[i] for i in order].index("split")
    if not any(row[part] for row in rows):  # a column of blanks is not a split
        rows = [[text or "train" if at == part else text for at, text in enumerate(row)] for row in rows]
    return [header[i] for i in order], labels, rows


def _patient(rng: np.random.Generator, k: int, style: int) -> str:
    return [f"p{k + 10}", f"{1000 + k}", f"{rng.integers(2**32):08x}-{k}x", f"Müller-{k + 1}"][style]


def _comment(rng: np.random.Generator) -> str:
    if rng.random() < 0.4:
        return str(rng.choice(["clear", "", "no finding"]))
    glue = [" ", " ", ", ", "; ", "\n", '"', '" ', "\t", "|", ",", ";", "\n\n"]
    pieces = [str(rng.choice(glue[4:])) if rng.random() < 0.2 else ""]
    for _ in range(rng.integers(1, 6)):
        pieces += [str(rng.choice(WORDS)), str(rng.choice(glue))]
    return "".join(pieces[:-1] if rng.random() < 0.7 else pieces).strip(" ")


def _quoted(text: str, delimiter: str, always: bool) -> str:
    needed = any(c in text for c in (delimiter, '"', "\n", "\r"))
    return '"' + text.replace('"', '""') + '"' if needed or always else text


def is_valid(raw: str, delimiter: str, columns: int) -> bool:
    """Is that a sequence of whole records of RFC 4180, or nothing?"""
    one = rf'(?:"(?:[^"]|"")*"|[^"{re.escape(delimiter)}\r\n]*)'
    record = one + rf"(?:{re.escape(delimiter)}{one}){{{columns - 1}}}"
    return re.fullmatch(rf"\s*|[\r\n]*{record}(?:[\r\n]+{record})*[\r\n]*", raw) is not None


Damage = Callable[[np.random.Generator, list[Record], str, list[str]], bool]
"""Changes the records; False if it does not apply."""


def _header(records: list[Record]) -> Record:
    return next(record for record in records if record.fields)


def _spoiled(edit: Callable[[np.random.Generator, list[str], str], str | None], *, is_structure: bool = True) -> Damage:
    """Damage of one record that has none yet. `edit`: fields as written → the record, or None.

    `is_structure`: it is seen only if quotes and delimiters become invalid.
    """

    def damage(rng: np.random.Generator, records: list[Record], delimiter: str, header: list[str]) -> bool:
        whole = [r for r in records if r.fields and not (r.harmed or r.doubtful)]
        if not whole or _header(records).harmed:  # a header and a row may be harmed alike
            return False
        record = whole[rng.integers(len(whole))]
        if record is _header(records) and any(r.harmed for r in records):
            return False
        raw = edit(rng, list(record.fields), delimiter)
        if raw is None or raw == record.raw or (is_structure and is_valid(raw, delimiter, len(header))):
            return False
        record.raw, record.harmed = raw, True
        return True

    return damage


def _pick(rng: np.random.Generator, fields: list[str], quoted: bool) -> int | None:
    found = [i for i, text in enumerate(fields) if text.startswith('"') == quoted]
    return found[rng.integers(len(found))] if found else None


def _one(change: Callable[[np.random.Generator, str], str], *, quoted: bool, is_structure: bool = True) -> Damage:
    """Change one quoted or unquoted field."""

    def edit(rng: np.random.Generator, fields: list[str], delimiter: str) -> str | None:
        at = _pick(rng, fields, quoted)
        if at is None:
            return None
        fields[at] = change(rng, fields[at])
        return delimiter.join(fields)

    return _spoiled(edit, is_structure=is_structure)


def _inside(rng: np.random.Generator, text: str, new: str) -> str:
    at = int(rng.integers(1, max(2, len(text))))
    return text[:at] + new + text[at:]


def _single_quote(rng: np.random.Generator, text: str) -> str:
    pairs = [m.start() for m in re.finditer('""', text[1:-1])]
    return text[: pairs[0] + 1] + text[pairs[0] + 2 :] if pairs else text


def _moved_quote(rng: np.random.Generator, fields: list[str], delimiter: str) -> str | None:
    at = _pick(rng, fields, quoted=True)
    if at is None:
        return None
    raw = delimiter.join(fields)
    start = len(delimiter.join([*fields[:at], ""]))
    old = start if rng.random() < 0.5 else start + len(fields[at]) - 1
    new = int(np.clip(old + rng.choice([-3, -2, -1, 1, 2, 3]), 0, len(raw) - 1))
    rest = raw[:old] + raw[old + 1 :]
    return rest[:new] + '"' + rest[new:]


def _dropped_delimiter(rng: np.random.Generator, fields: list[str], delimiter: str) -> str:
    at = int(rng.integers(1, len(fields)))
    return delimiter.join(fields[:at]) + delimiter.join(["", *fields[at:]])[1:]


def _added_delimiter(rng: np.random.Generator, fields: list[str], delimiter: str) -> str:
    at = int(rng.integers(0, len(fields) + 1))
    return delimiter.join([*fields[:at], "", *fields[at:]])


def _other_delimiter(rng: np.random.Generator, fields: list[str], delimiter: str) -> str:
    other = str(rng.choice([d for d in ",;\t|" if d != delimiter]))
    at = int(rng.integers(1, len(fields)))
    return delimiter.join([*fields[: at - 1], other.join(fields[at - 1 : at + 1]), *fields[at + 1 :]])


def _all_other_delimiters(rng: np.random.Generator, fields: list[str], delimiter: str) -> str:
    return str(rng.choice([d for d in ",;\t|" if d != delimiter])).join(fields)


def _cut(rng: np.random.Generator, fields: list[str], delimiter: str) -> str:
    raw = delimiter.join(fields)
    return raw[: rng.integers(1, max(2, len(raw)))]


def _broken(rng: np.random.Generator, fields: list[str], delimiter: str) -> str | None:
    """A line break in an unquoted part."""
    at = _pick(rng, fields, quoted=False)
    if at is None or not fields[at]:
        return None
    place = int(rng.integers(0, len(fields[at]) + 1))
    fields[at] = fields[at][:place] + "\n" + fields[at][place:]
    return delimiter.join(fields)


def _two(
    rng: np.random.Generator,
    records: list[Record],
    delimiter: str,
    first: Callable[[str], str],
    second: Callable[[str], str],
) -> bool:
    """Change an unquoted field of two records; often of the same column."""
    whole = [r for r in records[1:] if r.text and r.fields and not (r.harmed or r.doubtful)]
    if len(whole) < 2:
        return False
    chosen = [whole[k] for k in sorted(rng.choice(len(whole), 2, replace=False))]
    ats = [_pick(rng, record.fields, quoted=False) for record in chosen]
    if rng.random() < 0.7 and ats[0] is not None and not chosen[1].fields[ats[0]].startswith('"'):
        ats[1] = ats[0]
    if None in ats:
        return False
    for record, at, change in zip(chosen, ats, (first, second), strict=True):
        fields = [change(text) if column == at else text for column, text in enumerate(record.fields)]
        record.raw, record.harmed = delimiter.join(fields), True
    return True


def _quotes_around_lines(rng: np.random.Generator, records: list[Record], delimiter: str, header: list[str]) -> bool:
    """A quote opens a field and another ends a field of a later record: together they are valid."""
    return _two(rng, records, delimiter, lambda text: '"' + text, lambda text: text + '"')


def _two_open_quotes(rng: np.random.Generator, records: list[Record], delimiter: str, header: list[str]) -> bool:
    return _two(rng, records, delimiter, lambda text: '"' + text, lambda text: '"' + text)


def _joined(rng: np.random.Generator, records: list[Record], delimiter: str, header: list[str]) -> bool:
    """The end of a line is lost."""
    pairs = [k for k in range(1, len(records) - 1) if records[k].text and records[k + 1].text]
    if not pairs:
        return False
    first, second = (records[k] for k in [pairs[rng.integers(len(pairs))]] for k in (k, k + 1))
    if first.harmed or second.harmed:
        return False
    first.end, first.harmed, second.harmed = "", True, True
    return True


def _truncated(rng: np.random.Generator, records: list[Record], delimiter: str, header: list[str]) -> bool:
    at = int(rng.integers(1, len(records)))
    record = records[at]
    raw = record.raw[: rng.integers(1, max(2, len(record.raw)))]
    if record.harmed or not record.fields or is_valid(raw, delimiter, len(header)):
        return False
    record.raw, record.end, record.harmed = raw, "", True
    if records[at - 1].end == "":
        records[at - 1].harmed = True
    del records[at + 1 :]
    return True


def _repeated_header(rng: np.random.Generator, records: list[Record], delimiter: str, header: list[str]) -> bool:
    at = int(rng.integers(1, len(records) + 1))
    first = _header(records)
    if first.harmed or at <= records.index(first) or records[at - 1].end == "":
        return False
    mark = str(rng.choice(["", "\ufeff"]))
    records.insert(at, Record([], mark + first.raw, first.end, None, None, harmed=True))
    return True


def _blank_lines(rng: np.random.Generator, records: list[Record], delimiter: str, header: list[str]) -> bool:
    at = int(rng.integers(0, len(records) + 1))
    if at and records[at - 1].end == "":
        return False
    end = str(rng.choice(["\n", "\r\n", "\r"]))
    raw = str(rng.choice(["", "", " ", "\u00a0"]))
    records[at:at] = [Record([], raw, end, None, None) for _ in range(rng.integers(1, 4))]
    return True


def _swapped_ends(rng: np.random.Generator, records: list[Record], delimiter: str, header: list[str]) -> bool:
    for record in records:
        if record.end and rng.random() < 0.5:
            record.end = str(rng.choice(["\n", "\r\n", "\r", "\r\r\n"]))
            # "\r" and then "\n" at the start of the next record would be one line end
    return True


def _byte_order_marks(rng: np.random.Generator, records: list[Record], delimiter: str, header: list[str]) -> bool:
    for record in records:
        if record.fields and rng.random() < 0.3:
            record.raw = "\ufeff" + record.raw
    return all(record.end for record in records[:-1])


def _said(edit: Callable[[np.random.Generator, dict[str, str], list[str]], None]) -> Damage:
    """Damage that leaves valid text which says something else, or the same in another way."""

    def damage(rng: np.random.Generator, records: list[Record], delimiter: str, header: list[str]) -> bool:
        whole = [r for r in records if r.text and r.fields and not (r.harmed or r.doubtful)]
        if not whole:
            return False
        record = whole[rng.integers(len(whole))]
        row = dict(zip(header, record.text or [], strict=True))
        edit(rng, row, [name for name in header if name in MIMIC])
        text = [row[name] for name in header]
        if text == record.text:
            return False
        record.fields = [
            old if new == before else _quoted(new, delimiter, old.startswith('"'))
            for old, new, before in zip(record.fields, text, record.text or [], strict=True)
        ]
        record.raw = ("\ufeff" if record.raw.startswith("\ufeff") else "") + delimiter.join(record.fields)
        record.text, record.doubtful = text, True
        return True

    return damage


def _id_as_float(rng: np.random.Generator, row: dict[str, str], labels: list[str]) -> None:
    if row["patient_id"].isdigit():
        row["patient_id"] = str(rng.choice([row["patient_id"] + ".0", f"{float(row['patient_id']):.3e}"]))


def _blank_around_id(rng: np.random.Generator, row: dict[str, str], labels: list[str]) -> None:
    row["patient_id"] = str(rng.choice([" ", "\u00a0", ""])) + row["patient_id"] + str(rng.choice([" ", "\u00a0"]))


def _lost_id(rng: np.random.Generator, row: dict[str, str], labels: list[str]) -> None:
    row["patient_id"] = str(rng.choice(["", " ", "nan", "None"]))


def _label_word(rng: np.random.Generator, row: dict[str, str], labels: list[str]) -> None:
    name = labels[rng.integers(len(labels))]
    words = {
        "1": ["True", "1.00", "yes", "+1"],
        "0": ["False", "no", "0.000"],
        "-1": ["uncertain", "-1.000"],
        "": ["NaN", "?"],
    }
    row[name] = str(rng.choice(words[row[name].removesuffix(".0")]))


def _split_word(rng: np.random.Generator, row: dict[str, str], labels: list[str]) -> None:
    words = {
        "train": ["Training", "trian"],
        "validate": ["val", "valid "],
        "test": ["TEST", "texts"],
        "": [" ", "none?"],
    }
    row["split"] = str(rng.choice(words[row["split"]]))


DAMAGES: dict[str, Damage] = {
    "unclosed quote": _one(lambda rng, text: text[:-1], quoted=True),
    "unopened quote": _one(lambda rng, text: text[1:], quoted=True),
    "quote opens a field": _one(lambda rng, text: '"' + text, quoted=False),
    "quote ends a field": _one(lambda rng, text: text + '"', quoted=False),
    "quote in a field": _one(lambda rng, text: _inside(rng, text, '"'), quoted=False),
    "quote in a quoted field": _one(lambda rng, text: _inside(rng, text, '"'), quoted=True),
    "quote no longer doubled": _one(_single_quote, quoted=True),
    "moved quote": _spoiled(_moved_quote),
    "quotes around lines": _quotes_around_lines,
    "two open quotes": _two_open_quotes,
    "dropped delimiter": _spoiled(_dropped_delimiter),
    "added delimiter": _spoiled(_added_delimiter),
    "other delimiter": _spoiled(_other_delimiter),
    "other delimiters": _spoiled(_all_other_delimiters),
    "cut line": _spoiled(_cut),
    "broken line": _spoiled(_broken),
    "joined lines": _joined,
    "truncated file": _truncated,
    "repeated header": _repeated_header,
    "blank lines": _blank_lines,
    "swapped line ends": _swapped_ends,
    "byte order marks": _byte_order_marks,
    "wrong byte": _one(lambda rng, text: _inside(rng, text, BAD_BYTE), quoted=False, is_structure=False),
    "NUL": _one(lambda rng, text: _inside(rng, text, "\0" * int(rng.integers(1, 9))), quoted=False, is_structure=False),
    "lost character": _one(lambda rng, text: _inside(rng, text, "\ufffd"), quoted=False, is_structure=False),
    "id as float": _said(_id_as_float),
    "blank around id": _said(_blank_around_id),
    "lost id": _said(_lost_id),
    "word for a label": _said(_label_word),
    "word for a part": _said(_split_word),
}
"""Damages by name."""


def _rendered(
    rng: np.random.Generator,
    records: list[Record],
    delimiter: str,
    header: list[str],
    labels: list[str],
    damages: list[str],
) -> Table:
    name, line, text = str(rng.choice(["t.csv", "t.csv", "t.tsv", "t.csv.gz"])), 1, ""
    table = Table(name, b"", header, labels, {}, {}, set(), set(), False, damages, delimiter)
    for record in records:
        start = 1 + _breaks(text)
        text += record.raw + record.end
        line = start + _breaks(record.raw)
        if record.harmed:
            table.harmed |= set(range(start, line + 1))
        if record.doubtful:
            table.doubtful.add(start)
        if record.text is not None and not record.harmed:
            table.rows[start], table.meanings[start] = record.text, record.meaning or []
    table.is_header_harmed = _header(records).harmed
    encoding = str(rng.choice(["utf-8", "utf-8", "utf-8-sig", "utf-16"]))
    if BAD_BYTE in text:
        encoding = "utf-8"
    data = text.encode(encoding).replace(BAD_BYTE.encode(), bytes([rng.choice([0xE9, 0xFC, 0x92, 0xFF])]))
    table.data = gzip.compress(data) if name.endswith(".gz") else data
    return table


def _breaks(text: str) -> int:
    return len(re.findall("\r\n|\r|\n", text))
