"""The process that holds the model: `python -m cxrfast.app.worker FOLDER DEVICE [SHARDS]`, started by `process.ModelProcess`.

It reads questions and films on standard input and writes answers on standard output, until its input ends. It writes no
file, and nothing about a film outlives its answer.
"""

import base64
import json
import logging
import math
import os
import sys
from pathlib import Path
from typing import IO, Any

import cv2
import numpy as np
import torch

from cxrfast.app.process import LENGTH
from cxrfast.distributed import pick_device
from cxrfast.errors import CxrfastError, RunError, is_out_of_memory
from cxrfast.exports.description import MODEL
from cxrfast.exports.load import load
from cxrfast.inference.ensemble import ScaleEnsemble, stacked
from cxrfast.runs.folder import RunFolder
from cxrfast.runs.run import Run
from cxrfast.shards.images.bad_image import BadImage
from cxrfast.shards.images.decode import encode
from cxrfast.thresholds import Thresholds, in_words, mean_over_folds

MAP_SIDE = 256
"""Most px of a heat map's side: networks have feature maps of 64 × 64 at most, at 2048 px."""
QUALITY = 92
"""Of the JPEGs that the page shows."""


def open_model(folder: Path, device: str, shards: Path | None = None) -> ScaleEnsemble:
    """The model of an export folder, or of runs that have predicted: all, one scale's folds, or one. Raises RunError."""
    where = pick_device(device)
    if (folder / MODEL).exists():
        return load(folder, where)
    runs = [Run.open(one.folder) for one in RunFolder.within(folder)] or Run.find(folder)
    return ScaleEnsemble.from_runs(runs, where, shards=shards)


def about(model: ScaleEnsemble) -> dict[str, Any]:
    """What the page says about the model."""
    return {
        "labels": list(model.labels),
        "scales": list(model.scales),
        "networks": len(model.members),
        "rule": str(model.thresholds.rule) if model.thresholds else None,
        "resize": model.recipe.resize,
    }


def answer(model: ScaleEnsemble, task: dict[str, Any], film: bytes) -> dict[str, Any]:
    """The answer to one question about a film, as JSON. task: {"question": "scores"}, "pictures", or "map" with scale, finding.

    An answer with `error` has a status of HTTP; its words hold nothing of the film.
    """
    try:
        match task["question"]:
            case "scores":
                return scores(model, film)
            case "pictures":
                return pictures(model, film)
            case _:
                return heat_map(model, film, task["scale"], task["finding"])
    except BadImage as error:
        return {"status": 422, "error": f"this film cannot be used: {error}"}
    except CxrfastError as error:
        return {"status": 422, "error": str(error)}
    except Exception as error:
        if is_out_of_memory(error):
            return {"status": 503, "error": "memory ran out: close other programs, or use fewer scales"}
        return {"status": 500, "error": f"the model failed on this film ({type(error).__name__})"}


def scores(model: ScaleEnsemble, data: bytes) -> dict[str, Any]:
    """Probabilities, thresholds and verdicts of every finding, by scale and of the ensemble; remarks."""
    film = model.prepare(data)
    with torch.inference_mode():
        found = model(stacked([film], model.scales))
    by_scale = [
        judged(found.scale_log_odds[scale][0].cpu().numpy(), scale_thresholds(model, scale)) for scale in model.scales
    ]
    ensemble = judged(found.log_odds[0].cpu().numpy(), model.thresholds)
    return {
        "height": film.height,
        "width": film.width,
        "remarks": list(film.remarks),
        "unlike": {"assessed": film.unlike is not None, "reasons": list(film.unlike or ())},
        "findings": [
            {"scales": [column[j] for column in by_scale], "ensemble": ensemble[j] if len(model.scales) > 1 else None}
            for j in range(len(model.labels))
        ],
    }


def scale_thresholds(model: ScaleEnsemble, scale: int) -> Thresholds | None:
    """Thresholds for the mean over the folds of a scale; None if one of them has none."""
    folds = [member.thresholds for member in model.members if member.scale == scale]
    known = [thresholds for thresholds in folds if thresholds]
    return mean_over_folds(known) if len(known) == len(folds) else None


def judged(log_odds: np.ndarray, thresholds: Thresholds | None) -> list[dict[str, Any]]:
    """One entry per finding: probability, threshold (a probability) and verdict, each None where there is none.

    log_odds: float64 (L,).
    """
    n = len(log_odds)
    cuts, verdicts = np.full(n, np.nan), np.full(n, "")
    if thresholds:
        cuts = thresholds.probabilities
        verdicts = in_words(thresholds.verdicts(log_odds[None])[0])
    return [
        {"p": number(p), "threshold": number(cut), "verdict": verdict or None}
        for p, cut, verdict in zip(torch.sigmoid(torch.from_numpy(log_odds)).tolist(), cuts, verdicts, strict=True)
    ]


def number(value: float) -> float | None:
    """JSON has no NaN."""
    return float(value) if math.isfinite(value) else None


def pictures(model: ScaleEnsemble, data: bytes) -> dict[str, Any]:
    """The film as each scale's networks get it, JPEGs in base64, and the shape in which it is shown."""
    film = model.prepare(data)
    keeps_aspect = model.recipe.resize == "pad"
    height, width = (1, 1) if keeps_aspect else (film.height, film.width)
    return {"height": height, "width": width, "pictures": [text(encode(film.images[s], QUALITY)) for s in model.scales]}


def heat_map(model: ScaleEnsemble, data: bytes, scale: int, finding: int) -> dict[str, Any]:
    """Grad-CAM of a finding at a scale, values 0–255 in base64, row by row; `undefined` says why a network has none."""
    film = model.prepare(data)
    images = {scale: stacked([film], [scale])[scale]}
    try:
        found = model.gradcam(images, model.labels[finding])[scale][0]
    except RunError as error:
        return {"undefined": str(error)}
    side = min(scale, MAP_SIDE)
    small = cv2.resize(found, (side, side), interpolation=cv2.INTER_AREA)
    values = np.clip(np.rint(255 * small), 0, 255).astype(np.uint8)
    return {"side": side, "values": text(values.tobytes()), "is_zero": not found.any()}


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


# The process


def main() -> None:
    questions, answers = _streams()
    folder, device, *shards = sys.argv[1:]
    heard = _Heard()
    try:
        model = open_model(Path(folder), device, *map(Path, shards))
        write(answers, {**about(model), "warnings": heard.warnings})
    except (CxrfastError, OSError) as error:
        write(answers, {"error": str(error)})
        return
    except Exception as error:
        words = "memory ran out" if is_out_of_memory(error) else f"{type(error).__name__}: {error}"
        write(answers, {"error": f"{folder}: the model cannot be loaded ({words})"})
        return
    while (task := read(questions)) is not None:
        write(answers, answer(model, json.loads(task), read(questions) or b""))


class _Heard(logging.Handler):
    """Warnings of cxrfast while a model is loaded, for the server to show."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.warnings: list[str] = []
        logging.getLogger("cxrfast").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.warnings.append(record.getMessage())


def _streams() -> tuple[IO[bytes], IO[bytes]]:
    """Standard input, and an own copy of standard output: whatever libraries print goes to standard error instead."""
    if os.name == "posix":
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash must not leave a film's pixels in a file
    output = os.dup(1)
    os.dup2(2, 1)
    return sys.stdin.buffer, os.fdopen(output, "wb")


def read(stream: IO[bytes]) -> bytes | None:
    """One message; None at the end of the stream."""
    length = stream.read(LENGTH)
    return stream.read(int.from_bytes(length)) if len(length) == LENGTH else None


def write(stream: IO[bytes], message: dict[str, Any]) -> None:
    data = json.dumps(message, allow_nan=False).encode()
    stream.write(len(data).to_bytes(LENGTH) + data)
    stream.flush()


if __name__ == "__main__":
    main()
