"""`cxrfast synth`: a phantom MIMIC-CXR-JPG tree, radiographs nobody was exposed for.

In: how many images, how large, which seed. Out: the folders, CSVs and checksums of MIMIC-CXR-JPG 2.1.0 with their
quirks. The target must be new or empty.
"""

import csv
import gzip
import hashlib
import io
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

import cv2

from cxrfast import files
from cxrfast.errors import RunError
from cxrfast.labels import MIMIC
from cxrfast.machine import usable_cores
from cxrfast.phantoms.cohort import Image, make_cohort, stream
from cxrfast.phantoms.drawing import draw
from cxrfast.phantoms.findings import FINDINGS
from cxrfast.progress import progress
from cxrfast.shards.images.decode import encode as encode_jpeg

SIZES = (64, 4096)
"""Smallest and largest longer side, in pixels."""

DESCRIPTION = {
    "AP": ("CHEST (PORTABLE AP)", "antero-posterior", "Recumbent"),
    "PA": ("CHEST (PA AND LAT)", "postero-anterior", "Erect"),
    "LATERAL": ("CHEST (PA AND LAT)", "lateral", "Erect"),
}
"""Procedure, view code and orientation, as the metadata table has them."""

METADATA = [
    "dicom_id",
    "subject_id",
    "study_id",
    "PerformedProcedureStepDescription",
    "ViewPosition",
    "Rows",
    "Columns",
    "StudyDate",
    "StudyTime",
    "ProcedureCodeSequence_CodeMeaning",
    "ViewCodeSequence_CodeMeaning",
    "PatientOrientationCodeSequence_CodeMeaning",
]


def tables(made: list[Image], seed: int) -> dict[str, list[list[str]]]:
    """The four CSVs by their short name, header first. Pure."""
    labels = [["subject_id", "study_id", *MIMIC], *label_rows(made, seed)]
    metadata = [METADATA, *sorted(_metadata(image) for image in made)]
    split = [["dicom_id", "study_id", "subject_id", "split"], *sorted(_splits(made, seed))]
    return {"chexpert": labels, "negbio": labels, "metadata": metadata, "split": split}


def label_rows(made: list[Image], seed: int) -> list[list[str]]:
    """One row per study: mostly blank, some negatives said, some positives doubted. From ten studies on, one in
    fifty (rounded up) has no row, and as many have a blank one."""
    rng = stream(seed, "labels")
    studies = {image.study_id: image for image in made}
    odd = [int(study) for study in rng.permutation(sorted(studies))]
    few = -(-len(odd) // 50) if len(odd) >= 10 else 0
    missing, blank = set(odd[:few]), set(odd[few : 2 * few])
    rows = []
    for study, image in studies.items():
        row = [_label(name, image.present, float(rng.random())) for name in MIMIC]
        if study not in missing:
            rows.append([str(image.subject_id), str(study), *([""] * len(MIMIC) if study in blank else row)])
    return sorted(rows)


def _label(name: str, present: tuple[str, ...], chance: float) -> str:
    if name == "No Finding":
        return "" if present else "1.0"
    if name in present:
        return "-1.0" if chance < FINDINGS[name].uncertain else "1.0"
    return "0.0" if chance < (0.15 if name in FINDINGS else 0.04) else ""


def _metadata(image: Image) -> list[str]:
    procedure, code, orientation = DESCRIPTION[image.view]
    time = f"{image.time:.3f}".rstrip("0").rstrip(".")  # a number, so no leading zeros
    return [
        image.dicom_id,
        str(image.subject_id),
        str(image.study_id),
        procedure,
        image.view,
        str(image.height),
        str(image.width),
        str(image.date),
        time,
        procedure,
        code,
        orientation,
    ]


def _splits(made: list[Image], seed: int) -> Iterator[list[str]]:
    """A tenth of the patients to validate and to test, at least one each where there are three."""
    patients = stream(seed, "labels", 1).permutation(sorted({image.subject_id for image in made}))
    tenth = max(1, len(patients) // 10) if len(patients) >= 3 else 0
    part = {
        int(patient): "validate" if n < tenth else "test" if n < 2 * tenth else "train"
        for n, patient in enumerate(patients)
    }
    for image in made:
        yield [image.dicom_id, str(image.study_id), str(image.subject_id), part[image.subject_id]]


def encode(image: Image, seed: int) -> bytes:
    """Bytes of the file: a grey JPEG of quality 95, or what `image.damage` made of it."""
    if image.damage == "empty":
        return b""
    if image.damage == "not a JPEG":
        return b"<html><body>503 Service Unavailable: the download failed.</body></html>\n"
    jpeg = encode_jpeg(draw(image, seed), quality=95)
    return jpeg[: len(jpeg) // 2] if image.damage == "truncated" else jpeg


def _write_image(out: Path, seed: int, image: Image) -> str:
    """Write one image and return its hash. Not synced: SHA256SUMS.txt, written last, marks a whole tree."""
    data = encode(image, seed)
    path = out / image.path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def _write_images(out: Path, seed: int, made: list[Image], workers: int) -> list[str]:
    task = partial(_write_image, out, seed)
    hashes = []
    with progress(f"synth {out}", len(made)) as advance:
        if workers == 1:
            for image in made:
                hashes.append(task(image))
                advance()
            return hashes
        context = multiprocessing.get_context("spawn")  # a fork would copy the locks of the caller's threads
        with ProcessPoolExecutor(workers, context, cv2.setNumThreads, (1,)) as pool:
            for found in pool.map(task, made, chunksize=max(1, min(8, len(made) // (4 * workers)))):
                hashes.append(found)
                advance()
    return hashes


def _csv_gz(rows: list[list[str]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return gzip.compress(text.getvalue().encode(), mtime=0)


def _check(out: Path, images: int, size: int, seed: int, corrupt: int, workers: int) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        what = "is not empty" if out.is_dir() else "is a file"
        raise RunError(f"{out} {what}: name a new or empty folder for the phantoms, nothing is overwritten")
    if images < 1:
        raise RunError(f"images is {images}: ask for at least 1")
    if not SIZES[0] <= size <= SIZES[1]:
        raise RunError(f"size is {size} px: choose {SIZES[0]} to {SIZES[1]}, the longer side of an image")
    if not 0 <= corrupt <= images:
        raise RunError(f"corrupt is {corrupt}: choose 0 to {images}, the number of images")
    if not 0 <= seed < 1 << 63:
        raise RunError(f"seed is {seed}: choose 0 or a positive number below 2**63")
    if workers < 1:
        raise RunError(f"workers is {workers}: ask for at least 1")


def synth(
    out: Path, images: int = 600, size: int = 1024, seed: int = 0, corrupt: int = 0, workers: int | None = None
) -> dict[str, int]:
    """Write a phantom MIMIC-CXR-JPG tree into `out`; returns its counts: images, studies, patients, corrupt.

    `size`: longer side in pixels. `corrupt`: images to damage (truncated, empty, not a JPEG, in turn).
    `workers`: processes, by default one a core. Same arguments, same bytes, whatever `workers` is.
    Raises RunError for arguments out of range, for an `out` that holds something, and where writing fails.
    """
    out = Path(out)
    if workers is None:
        workers = usable_cores()
    _check(out, images, size, seed, corrupt, workers)
    made = make_cohort(images, size, seed, corrupt)
    try:
        out.mkdir(parents=True, exist_ok=True)
        hashes = _write_images(out, seed, made, min(workers, images))
        for name, rows in tables(made, seed).items():
            files.write_bytes(out / f"mimic-cxr-2.0.0-{name}.csv.gz", _csv_gz(rows))
        found = sorted((image.path, digest) for image, digest in zip(made, hashes, strict=True))
        names, sums = [path for path, _ in found], [f"{digest} {path}" for path, digest in found]
        files.write_bytes(out / "IMAGE_FILENAMES", ("\n".join(names) + "\n").encode())
        files.write_bytes(out / "SHA256SUMS.txt", ("\n".join(sums) + "\n").encode())
    except OSError as error:
        raise RunError(
            f"{out}: {error.strerror or error}: make room or choose another folder, then start again with an empty one"
        ) from error
    except BrokenProcessPool as error:
        raise RunError(
            f"{out}: a worker process died, perhaps for want of memory: empty the folder and use "
            f"fewer than {workers} (scripts need `if __name__ == '__main__':`)"
        ) from error
    return {
        "images": images,
        "studies": len({image.study for image in made}),
        "patients": len({image.patient for image in made}),
        "corrupt": corrupt,
    }
