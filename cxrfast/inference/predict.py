"""`cxrfast predict RUNS FILMS`: new films through an ensemble, into a CSV and a Parquet file with one line per film.

Films stream through threads that decode each once for all scales; answers go to a working file at once, so a command that
was interrupted is continued. Outputs are whole or absent, and a file that this command did not write is never replaced.
"""

import hashlib
import json
import logging
import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from cxrfast import __version__
from cxrfast.errors import RunError
from cxrfast.files import TEMPORARY, read_file, sha256, sync_folder, temporary_name, write_json
from cxrfast.inference.ensemble import ScaleEnsemble, Scores
from cxrfast.inference.film import Film
from cxrfast.inference.listing import Listed, list_films
from cxrfast.inference.table import Line, table_of
from cxrfast.inference.working_file import Answer, WorkingFile, key, pack, unpack
from cxrfast.machine import usable_cores
from cxrfast.pipelines.films import FilmBatch, batch_size, film_batches
from cxrfast.progress import Advance, progress
from cxrfast.shards.images.bad_image import BadImage, Reason
from cxrfast.tables import csv_text
from cxrfast.units import counted

log = logging.getLogger(__name__)

OUT = Path("predictions.csv")

PART = ".part"
"""Suffix of the working file, after the name of the CSV."""

MADE_BY = "cxrfast predict"

CHUNK = 500
"""Films per piece of the outputs."""


@dataclass(frozen=True)
class Outcome:
    """What became of the films."""

    csv: Path
    films: int
    unusable: int
    """Lines with an error."""
    unlike: int

    def __str__(self) -> str:
        told = [f"{self.csv}: {counted(self.films, 'film')}"]
        if self.unusable:
            told.append(f"{self.unusable:,} could not be used (column error)")
        if self.unlike:
            told.append(f"{self.unlike:,} unlike the training set (column reasons)")
        return ", ".join(told)


def predict_films(
    ensemble: ScaleEnsemble, given: Sequence[str], out: Path = OUT, *, threads: int | None = None
) -> Outcome:
    """Predict the films that paths, folders and patterns name; write `out`, a Parquet file and a JSON file next to it.

    Raises RunError if nothing is named, if an output exists that this command did not write, or if another process is
    predicting into it.
    """
    outputs = Outputs(out)
    films = list_films(given)
    batch = batch_size(ensemble.scales, max(member.micro_batch for member in ensemble.members))
    with WorkingFile(outputs.working, fingerprint(ensemble, batch), outputs.state()) as work:
        if work.others:
            log.warning(f"{outputs.working} holds answers of another model, device or version: starting over")
        outputs.check(work)
        outputs.remove_leftovers()
        todo = [first for first in range(0, len(films), batch) if not all(map(work.get, films[first : first + batch]))]
        left = [film for first in todo for film in films[first : first + batch]]
        if len(left) < len(films):
            log.info(f"resuming: {len(films) - len(left):,} of {len(films):,} films are done")
        with progress("predict films", len(left), unit="films") as advance:
            _answer(ensemble, left, batch, work, advance, threads or usable_cores())
        return outputs.write(ensemble, films, work)


def _answer(
    ensemble: ScaleEnsemble, films: Sequence[Listed], batch: int, work: WorkingFile, advance: Advance, threads: int
) -> None:
    """Predict films, batch by batch, into the working file. A GPU computes one batch while the answers of another are kept."""

    def prepare(place: int) -> tuple[dict[int, np.ndarray], Film]:
        if problem := films[place].problem:
            raise _Unlisted(problem)
        film = ensemble.prepare(films[place].path)
        return film.images, Film(**{**vars(film), "images": {}})

    def keep(found: FilmBatch[Film], scores: Scores) -> None:
        logits = np.stack([scores.logits[member.name].cpu().numpy() for member in ensemble.members], axis=1)
        of = dict(zip(found.used.tolist(), logits, strict=True))
        listed = films[found.first : found.first + len(found.facts)]
        work.add(
            _answer_of(film, fact, of.get(i)) for i, (film, fact) in enumerate(zip(listed, found.facts, strict=True))
        )
        advance(len(listed))

    waiting: deque[tuple[FilmBatch[Film], Scores]] = deque()
    stream = film_batches(
        [film.path for film in films], prepare, ensemble.scales, batch=batch, device=ensemble.device, threads=threads
    )
    with torch.inference_mode():
        for found in stream:
            waiting.append((found, ensemble(found.images)))
            if len(waiting) > 1 or ensemble.device.type == "cpu":
                keep(*waiting.popleft())
        while waiting:
            keep(*waiting.popleft())


class _Unlisted(BadImage):
    """A film that could not even be listed."""

    def __init__(self, problem: str) -> None:
        super().__init__(Reason.UNREADABLE)
        self.args = (problem,)


def _answer_of(film: Listed, fact: Film | BadImage, logits: np.ndarray | None) -> Answer:
    known: dict[str, Any] = {"film": key(film.name), "bytes": film.bytes, "modified": film.modified}
    if isinstance(fact, BadImage):
        return Answer(**known, error=str(fact))
    assert logits is not None
    if not np.isfinite(logits).all():
        return Answer(**known, error="a network gave no finite logit for it", height=fact.height, width=fact.width)
    return Answer(
        **known,
        height=fact.height,
        width=fact.width,
        remarks=list(fact.remarks),
        unlike=None if fact.unlike is None else list(fact.unlike),
        logits=pack(logits),
    )


def fingerprint(ensemble: ScaleEnsemble, batch: int) -> str:
    """Hash of everything that logits and flags depend on besides the films: weights, precision, recipe, reference, batch, device."""
    digest = hashlib.sha256()
    described = {
        "version": __version__,
        "device": ensemble.device.type,
        "batch": batch,
        "labels": ensemble.labels,
        "recipe": asdict(ensemble.recipe),
        "reference": ensemble.reference.json() if ensemble.reference else None,
        "members": [[m.name, m.scale, m.fold, m.precision, m.micro_batch] for m in ensemble.members],
    }
    digest.update(json.dumps(described, sort_keys=True).encode())
    for member in ensemble.members:
        for name, tensor in member.network.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


# Outputs


class Outputs:
    """The CSV, the Parquet file and the JSON file of a prediction. Raises RunError unless `out` ends in .csv, in a folder."""

    def __init__(self, out: Path) -> None:
        if out.suffix.lower() != ".csv":
            raise RunError(
                f"--out {out}: give the name of a CSV file, such as predictions.csv; a Parquet file is written next to it"
            )
        if not out.parent.is_dir():
            raise RunError(f"--out {out}: there is no folder {out.parent}: make it first")
        self.csv, self.parquet, self.json = out, out.with_suffix(".parquet"), out.with_suffix(".json")
        self.working = out.with_name(out.name + PART)

    def state(self) -> dict[str, str | None]:
        """By output: its sha256, None if it is absent. Raises RunError if this command did not write it."""
        written = self._recorded()
        found: dict[str, str | None] = {}
        for path in (self.csv, self.parquet):
            found[path.name] = _hash(path)
            if found[path.name] not in (None, written.get(path.name)) and not self.working.exists():
                raise self._foreign(path)
        return found

    def check(self, work: WorkingFile) -> None:
        """Raises RunError if an output is neither as it was when the prediction began nor one that it wrote."""
        for path in (self.csv, self.parquet):
            known = {None, work.before.get(path.name), work.finished.get(path.name), self._recorded().get(path.name)}
            if _hash(path) not in known:
                raise self._foreign(path)

    def _recorded(self) -> dict[str, str]:
        """What the JSON file says about outputs, by name. Raises RunError if it is not one of ours."""
        if not os.path.lexists(self.json):
            return {}
        try:
            content = json.loads(read_file(self.json, 2**28))
            if content["made_by"] != MADE_BY:
                raise ValueError
            return dict(content["outputs"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise self._foreign(self.json) from error

    def _foreign(self, path: Path) -> RunError:
        return RunError(
            f"{path} exists, and this command did not write it, or it was changed since: move it away, or give another --out"
        )

    def remove_leftovers(self) -> None:
        """Remove temporary files of a process that was killed."""
        for path in (self.csv, self.parquet):
            for name in os.listdir(path.parent):
                if name.startswith(f"{path.name}.") and name.endswith(TEMPORARY):
                    (path.parent / name).unlink(missing_ok=True)

    def write(self, ensemble: ScaleEnsemble, films: Sequence[Listed], work: WorkingFile) -> Outcome:
        """Write all lines, in the order of the films, and remove the working file."""
        drafts = {path: temporary_name(path) for path in (self.csv, self.parquet)}
        counts = {"films": len(films), "unusable": 0, "unlike": 0}
        try:
            self._draft(drafts, _tables(ensemble, films, work), counts)
            hashes = {path.name: sha256(draft) for path, draft in drafts.items()}
            self.check(work)
            work.finish(hashes)
            for path, draft in drafts.items():
                os.replace(draft, path)
            sync_folder(self.csv.parent)
        finally:
            for draft in drafts.values():
                draft.unlink(missing_ok=True)
        write_json(self.json, {"made_by": MADE_BY, "outputs": hashes, **counts, **describe(ensemble)})
        work.remove()
        return Outcome(self.csv, **counts)

    def _draft(self, drafts: dict[Path, Path], tables: Iterator[pd.DataFrame], counts: dict[str, int]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        with ExitStack() as stack:
            text = stack.enter_context(open(drafts[self.csv], "wb"))
            binary = stack.enter_context(open(drafts[self.parquet], "wb"))
            writer = None
            for table in tables:
                counts["unusable"] += int((table["error"] != "").sum())
                counts["unlike"] += int((table["unlike"] == "yes").sum())
                lines = csv_text(table)
                text.write((lines if writer is None else lines.partition("\n")[2]).encode())
                arrow = pa.Table.from_pandas(table, preserve_index=False)
                if writer is None:
                    writer = stack.enter_context(pq.ParquetWriter(binary, arrow.schema))
                writer.write_table(arrow.cast(writer.schema))
            if writer:
                writer.close()
            for file in (text, binary):
                file.flush()
                os.fsync(file.fileno())


def _hash(path: Path) -> str | None:
    """sha256 of a file; None if it is absent, "" if it is not a regular file."""
    if not os.path.lexists(path):
        return None
    try:
        return sha256(path)
    except OSError:
        return ""


def _tables(ensemble: ScaleEnsemble, films: Sequence[Listed], work: WorkingFile) -> Iterator[pd.DataFrame]:
    """The lines of the films, CHUNK at a time."""
    shape = len(ensemble.members), len(ensemble.labels)
    for at in range(0, len(films), CHUNK):
        answers = [work.get(film) for film in films[at : at + CHUNK]]
        known = [answer for answer in answers if answer]
        if len(known) < len(answers):
            raise RunError(f"{work.path} lost answers while this command ran: run it again")
        lines = [_line(film, answer) for film, answer in zip(films[at : at + CHUNK], known, strict=True)]
        yield table_of(ensemble, lines, np.stack([unpack(answer.logits, shape) for answer in known]))


def _line(film: Listed, answer: Answer) -> Line:
    return Line(
        film=film.name,
        error=answer.error,
        height=answer.height,
        width=answer.width,
        remarks=answer.remarks,
        unlike=answer.unlike,
    )


def describe(ensemble: ScaleEnsemble) -> dict[str, Any]:
    """What the JSON file says about the model: members, weights, thresholds, recipe."""
    thresholds = ensemble.thresholds
    return {
        "version": __version__,
        "members": [member.name for member in ensemble.members],
        "scales": list(ensemble.scales),
        "folds": list(ensemble.folds),
        "weights": {
            str(fold): dict(zip(ensemble.labels, w.tolist(), strict=True)) for fold, w in ensemble.weights.items()
        },
        "thresholds": None if thresholds is None else _thresholds(ensemble),
        "recipe": asdict(ensemble.recipe),
    }


def _thresholds(ensemble: ScaleEnsemble) -> dict[str, Any]:
    """By finding: the ensemble's threshold as a probability, and what it does on validation rows."""
    t = ensemble.thresholds
    assert t is not None
    values = zip(ensemble.labels, t.probabilities.tolist(), t.sensitivity, t.specificity, t.logits, strict=True)
    return {
        "rule": str(t.rule),
        "by_finding": {
            label: {
                "probability": None if logit is None else probability,
                "validation_sensitivity": sensitivity,
                "validation_specificity": specificity,
            }
            for label, probability, sensitivity, specificity, logit in values
        },
    }
