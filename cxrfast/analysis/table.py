"""One long table of all predictions, for statistics of one's own: one line per fold, image and finding.

In: run folders with predictions; no shard set, no GPU. Out: a CSV or Parquet file, written fold by fold in blocks of rows, so
that it may be larger than memory. The same runs give the same bytes.
"""

import csv
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from cxrfast.analysis import mixture
from cxrfast.analysis.answers import Answers, read_answers
from cxrfast.analysis.join import (
    by_name,
    check_same_rows,
    check_same_study,
    choose_scales,
    join_logits,
    with_predictions,
)
from cxrfast.analysis.other_set import AS_TRAINED, OtherRules, OtherTest, other_folder
from cxrfast.errors import RunError
from cxrfast.files import make_own_folder, replacing
from cxrfast.metrics import sigmoid
from cxrfast.progress import Advance, progress
from cxrfast.runs.external import read_external
from cxrfast.runs.run import Run
from cxrfast.tables import no_formula

FOLDER = "evaluation"

BLOCK = 8192
"""Images whose lines are made at a time."""

ENSEMBLE = "ensemble"
"""What the columns of the stacked ensemble are called."""

SUFFIXES = (".csv", ".parquet")


@dataclass(frozen=True)
class Written:
    """What `write_table` wrote."""

    path: Path
    lines: int
    columns: tuple[str, ...]
    skipped: tuple[str, ...]
    """Runs without predictions."""
    no_ensemble: str
    """Why there is no ensemble; "" if there is one."""
    rules: str
    """Which rows and findings of another set count, as paragraphs; "" of the runs' own."""

    @property
    def notes(self) -> list[str]:
        """What to know about the table, in sentences."""
        found = self.rules.split("\n") if self.rules else []
        found += [f"left out, without predictions: {', '.join(self.skipped)}"] if self.skipped else []
        return found + ([f"without an ensemble: {self.no_ensemble}"] if self.no_ensemble else [])


def write_table(
    runs: Path,
    out: Path | None = None,
    part: str = "test",
    *,
    on: str | None = None,
    rules: OtherRules = AS_TRAINED,
    without_shared_patients: bool = False,
    patient_ids: bool = False,
    finished_only: bool = False,
) -> Written:
    """Write every prediction of a part of the runs' own rows, or of another set's rows (`on`), into `out`.

    Default: RUNS/evaluation/predictions.csv, predictions-val.csv, or on-NAME/predictions.csv.

    Columns: row, image_id, patient_id (only with `patient_ids`), part (or name of the set), fold, label, raw (1, 0, -1 or
    blank), target (0 or 1 by the label policies; blank where it does not count), counts, then `logit_` and `probability_` of
    each group of runs and of the stacked ensemble, whose weights come from the validation rows of the same fold.

    `rules`, `without_shared_patients`, `finished_only`: as in `evaluate_on`. Raises RunError for another suffix than .csv and
    .parquet, and as `evaluate` does.
    """
    if out is not None and out.suffix not in SUFFIXES:
        raise RunError(f"--out {out}: give a name that ends in {' or '.join(SUFFIXES)}")
    found = with_predictions(runs, finished_only, on=on, own=on is None)
    groups = by_name(found.runs)
    check_same_study(found.runs)
    test = OtherTest.of(found.runs, on, rules, without_shared_patients, every_finding=True) if on else None
    try:
        stacked, why = choose_scales(runs, None, finished_only, on=on)[0], ""
    except RunError as error:
        stacked, why = {}, str(error)
    names = [*groups, *([ENSEMBLE] if stacked else [])]
    schema = _schema(names, patient_ids)
    lines, out = 0, out or _own_file(runs, part, on)
    with (
        progress("table", len(found.runs), unit="runs") as advance,
        replacing(out) as file,
        _Writer(file, out.suffix, schema) as writer,
    ):
        for fold in sorted({run.config.fold for run in found.runs}):
            of_fold = {name: group[fold] for name, group in groups.items() if fold in group}
            block = _read(of_fold, part, test, advance)
            if stacked and all(fold in group for group in stacked.values()):
                block.logits[ENSEMBLE] = _stack([group[fold] for group in stacked.values()], part, test)
            for batch in _lines(block, names, schema):
                writer.write(batch)
                lines += len(batch)
    return Written(out, lines, tuple(schema.names), tuple(found.without), why, test.note if test else "")


def _own_file(runs: Path, part: str, on: str | None) -> Path:
    """Where the table goes if nothing else is said; its folder is made."""
    make_own_folder(folder := runs / FOLDER)
    if on:
        make_own_folder(folder := folder / other_folder(on))
    return folder / ("predictions.csv" if on or part == "test" else f"predictions-{part}.csv")


@dataclass(frozen=True)
class _Fold:
    """Everything that the lines of one fold are made of."""

    first: Answers
    """Raw labels and rows of one of the runs: all have the same."""
    target: np.ndarray
    counts: np.ndarray
    ids: pd.DataFrame
    """image_id and patient_id of the rows, in their order."""
    logits: dict[str, np.ndarray]
    """(n, L) by name of the column."""


def _read(runs: Mapping[str, Run], part: str, test: OtherTest | None, advance: Advance) -> _Fold:
    """The answers of a fold's runs, by group, joined by row. Raises RunError if they hold different rows or labels."""
    answers: dict[str, Answers] = {}
    for name, run in runs.items():
        answers[name] = test.read(run) if test else read_answers(run, part)
        check_same_rows(next(iter(answers.values())), answers[name])
        advance(note=run.name)
    first = next(iter(answers.values()))
    target, counts = first.targets()
    if test:
        counts &= np.isin(test.labels, test.matching.both)
    logits = {name: one.logits for name, one in answers.items()}
    return _Fold(first, target, counts, _ids(first, test), logits)


def _ids(answers: Answers, test: OtherTest | None) -> pd.DataFrame:
    rows = (
        read_external(answers.run, test.name).rows if test else answers.run.rows(["row", "image_id", "patient_id"])
    ).set_index("row")
    return rows.loc[answers.row, ["image_id", "patient_id"]]


def _stack(runs: list[Run], part: str, test: OtherTest | None) -> np.ndarray:
    """Log-odds of the stacked ensemble, float64 (n, L): weights from the validation rows of the fold."""
    weights = mixture.fit_weights(*join_logits(runs, "val"))
    if test:
        weights = weights[[runs[0].config.labels.index(label) for label in test.labels]]
    return mixture.log_odds(join_logits(runs, part, test)[0], weights)


def _schema(names: list[str], patient_ids: bool) -> pa.Schema:
    fields: list[tuple[str, pa.DataType]] = [("row", pa.int64()), ("image_id", pa.string())]
    fields += [("patient_id", pa.string())] if patient_ids else []
    fields += [("part", pa.string()), ("fold", pa.int8()), ("label", pa.string())]
    fields += [("raw", pa.int8()), ("target", pa.int8()), ("counts", pa.bool_())]
    for name in names:
        fields += [(f"logit_{name}", pa.float64() if name == ENSEMBLE else pa.float32())]
        fields += [(f"probability_{name}", pa.float64())]
    return pa.schema(fields)


def _lines(fold: _Fold, names: list[str], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """The lines of a fold, images in the order of their rows, findings in the order of the logits."""
    answers, labels = fold.first, len(fold.first.labels)
    for at in range(0, len(answers.row), BLOCK):
        block = slice(at, at + BLOCK)
        n = len(answers.row[block])
        raw, counts = answers.raw[block].ravel(), fold.counts[block].ravel()
        columns: dict[str, Any] = {
            "row": np.repeat(answers.row[block], labels),
            "part": pa.array([answers.part]).take(pa.array(np.zeros(n * labels, np.int64))),
            "fold": np.full(n * labels, answers.run.config.fold, np.int8),
            "label": pa.array(answers.labels).take(pa.array(np.tile(np.arange(labels), n))),
            "raw": pa.array(np.nan_to_num(raw).astype(np.int8), mask=np.isnan(raw)),
            "target": pa.array(fold.target[block].ravel().astype(np.int8), mask=~counts),
            "counts": counts,
        }
        for name in ("image_id", "patient_id"):
            if name in schema.names:
                ids = pa.array(fold.ids[name].iloc[block], pa.string())
                columns[name] = ids.take(pa.array(np.repeat(np.arange(n), labels)))
        for name in names:
            logits = fold.logits[name][block].ravel() if name in fold.logits else None
            kind = schema.field(f"logit_{name}").type
            columns[f"logit_{name}"] = pa.nulls(n * labels, kind) if logits is None else pa.array(logits, kind)
            columns[f"probability_{name}"] = (
                pa.nulls(n * labels, pa.float64()) if logits is None else pa.array(sigmoid(logits))
            )
        yield pa.RecordBatch.from_pydict({name: columns[name] for name in schema.names}, schema=schema)


class _Writer:
    """Writes batches as CSV or Parquet."""

    def __init__(self, file: IO[bytes], suffix: str, schema: pa.Schema) -> None:
        self._texts = [n for n, kind in enumerate(schema.types) if kind == pa.string()] if suffix == ".csv" else []
        if suffix == ".csv":
            head = io.StringIO()
            csv.writer(head, lineterminator="\n").writerow(map(no_formula, schema.names))
            file.write(head.getvalue().encode())
            options = pyarrow.csv.WriteOptions(include_header=False, quoting_style="needed")
            self._writer: Any = pyarrow.csv.CSVWriter(file, schema, write_options=options)
        else:
            self._writer = pq.ParquetWriter(file, schema, compression="zstd")

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *error: object) -> None:
        self._writer.close()

    def write(self, batch: pa.RecordBatch) -> None:
        for n in self._texts:
            batch = batch.set_column(n, batch.schema.field(n), _plain(batch.column(n)))
        self._writer.write_batch(batch)


def _plain(texts: pa.Array) -> pa.Array:
    """Texts as a CSV file may hold them."""
    encoded = texts.dictionary_encode()
    plain = pa.array([no_formula(text) for text in encoded.dictionary.to_pylist()], pa.string())
    return plain.take(encoded.indices)
