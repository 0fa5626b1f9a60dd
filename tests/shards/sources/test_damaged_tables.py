"""Damaged tables by the thousand: each is read as it was meant or refused with a line that the damage touches."""

import os
import re
from collections import Counter
from pathlib import Path

import numpy as np
from damaged_tables import DAMAGES, Table, make

from cxrfast.errors import ShardError
from cxrfast.shards.sources.read import read_source
from cxrfast.shards.sources.table_files import read_table
from cxrfast.shards.sources.tables import delimited
from cxrfast.shards.storage import Tree

TABLES = int(os.environ.get("CXRFAST_TABLES", "300"))


def named(message: str) -> set[int]:
    """Lines that a message names."""
    found = re.findall(r"\blines? (\d+(?:(?:, | to )\d+)*)", message.replace("(line 1)", "line 1"))
    return {int(number) for numbers in found for number in re.findall(r"\d+", numbers)}


def outcome(table: Table, folder: Path) -> str:
    """`read` or `refused`. Raises AssertionError if it is read differently, refused for nothing or with another line."""
    (folder / table.name).write_bytes(table.data)
    try:
        read = read_table(Tree(folder), table.name, table.header)
    except ShardError as error:
        message = str(error)
    else:
        rows = {line: list(fields) for line, *fields in read.fillna("").itertuples(name=None)}
        assert not table.harmed, f"read, but lines {sorted(table.harmed)} are damaged"
        assert rows == table.rows
        return "read"
    assert table.harmed or (not table.rows and "holds no lines" in message), f"refused for nothing: {message}"
    assert "\n" not in message
    assert table.is_header_harmed or named(message) & table.harmed or not table.rows, message
    return "refused"


def meant(table: Table, folder: Path) -> str:
    """The same for what a source reads, whose labels and ids are values."""
    columns = dict(zip(table.header, zip(*table.meanings.values(), strict=True), strict=True))
    try:
        images = read_source(
            "table",
            folder,
            {"table": table.name, "label": table.labels, "split_column": "split", "path_column": "path"},
        ).images
    except ShardError as error:
        message = str(error)
    else:
        for name in ("path", "patient_id"):
            assert images[name].tolist() == list(columns[name])
        assert images["split"].fillna("").tolist() == list(columns["split"])
        for label in table.labels:
            np.testing.assert_array_equal(images[label], [np.float32(text or "nan") for text in columns[label]])
        return "understood"
    assert table.doubtful, f"refused for nothing: {message}"
    assert named(message) & table.doubtful, message
    return "not understood"


def test_a_damaged_table_is_read_as_it_was_meant_or_refused_with_a_line_of_the_damage(tmp_path, caplog, monkeypatch):
    caplog.set_level("ERROR")  # not the lines about delimiters
    counts: Counter[str] = Counter()
    wrong = []
    for seed in range(TABLES):
        table = make(seed)
        monkeypatch.setattr(delimited, "BLOCK", (2, 5, 10_000)[seed % 3])
        folder = tmp_path / str(seed)
        folder.mkdir()
        try:
            result = outcome(table, folder)
            counts[result] += 1
            if result == "read":
                counts[meant(table, folder)] += 1
        except Exception as error:
            wrong.append(f"seed {seed} ({', '.join(table.damages)}): {type(error).__name__}: {error}")
            continue
        counts["undamaged"] += not table.damages
        counts.update(f"{kind}, {result}" for kind in table.damages)
        (folder / table.name).unlink()
    print(f"\n{TABLES} tables: " + "; ".join(f"{kind} {n:,}" for kind, n in sorted(counts.items())))
    assert not wrong, f"{len(wrong)} of {TABLES} tables:\n" + "\n".join(wrong[:20])
    assert {kind.split(", ")[0] for kind in counts} >= set(DAMAGES), "each kind of damage was done"
    assert counts["read"] > TABLES // 5
    assert counts["refused"] > TABLES // 3
