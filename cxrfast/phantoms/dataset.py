"""`cxrfast synth`: a phantom MIMIC-CXR-JPG tree.

In: number and size of the images, and a seed. Out: the folders, CSVs and checksums of MIMIC-CXR-JPG 2.1.0 with their
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
from contextlib import ExitStack
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


def tables(made: list[Image], seed: int) -> dict[str, list[list[str]]]:
    """The four CSVs by their short name, header first. Pure."""
    labels = [["subject_id", "study_id", *MIMIC], *label_rows(made, seed)]
    metadata = sorted((_metadata(image) for image in made), key=lambda row: row["dicom_id"])
    split = [["dicom_id", "study_id", "subject_id", "split"], *sorted(_splits(made, seed))]
    return {
        "chexpert": labels,
        "negbio": labels,
        "metadata": [[*metadata[0]], *([*row.values()] for row in metadata)],
        "split": split,
    }


def label_rows(made: list[Image], seed: int) -> list[list[str]]:
    """One row per study: mostly blank, some negatives stated, some positives uncertain. From ten studies on, one in a
    hundred (at least one) has no row, and one in fifty (rounded up) has a blank one."""
    rng = stream(seed, "labels")
    studies = {image.study_id: image for image in made}
    odd = [int(study) for study in rng.permutation(sorted(studies))]
    few, fewer = (-(-len(odd) // 50), max(1, len(odd) // 100)) if len(odd) >= 10 else (0, 0)
    missing, blank = set(odd[:fewer]), set(odd[few : 2 * few])
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


def _metadata(image: Image) -> dict[str, str]:
    """A row of the metadata table, by column."""
    procedure, code, orientation = DESCRIPTION[image.view]
    time = f"{image.time:.3f}".rstrip("0").rstrip(".")  # a number, so no leading zeros
    return {
        "dicom_id": image.dicom_id,
        "subject_id": str(image.subject_id),
        "study_id": str(image.study_id),
        "PerformedProcedureStepDescription": procedure,
        "ViewPosition": image.view,
        "Rows": str(image.height),
        "Columns": str(image.width),
        "StudyDate": str(image.date),
        "StudyTime": time,
        "ProcedureCodeSequence_CodeMeaning": procedure,
        "ViewCodeSequence_CodeMeaning": code,
        "PatientOrientationCodeSequence_CodeMeaning": orientation,
    }


def _splits(made: list[Image], seed: int) -> Iterator[list[str]]:
    """One row per image; a tenth of the patients each in validate and test, at least one each if there are three."""
    patients = stream(seed, "labels", 1).permutation(sorted({image.subject_id for image in made}))
    tenth = max(1, len(patients) // 10) if len(patients) >= 3 else 0
    part = {
        int(patient): "validate" if n < tenth else "test" if n < 2 * tenth else "train"
        for n, patient in enumerate(patients)
    }
    for image in made:
        yield [image.dicom_id, str(image.study_id), str(image.subject_id), part[image.subject_id]]


def encode(image: Image, seed: int) -> bytes:
    """Bytes of the file: a grey JPEG of quality 95, damaged as `image.damage` says.

    Encoded with the fast DCT, as ever: sets of phantoms can still be repaired from a tree made by a later version.
    """
    if image.damage == "empty":
        return b""
    if image.damage == "not a JPEG":
        return b"<html><body>503 Service Unavailable: the download failed.</body></html>\n"
    jpeg = encode_jpeg(draw(image, seed), quality=95, dct="fast")
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
    with progress(f"synth {out}", len(made)) as advance, ExitStack() as stack:
        written: Iterator[str] = map(task, made)
        if workers > 1:
            spawn = multiprocessing.get_context("spawn")  # a fork would copy the locks of the caller's threads
            pool = stack.enter_context(ProcessPoolExecutor(workers, spawn, cv2.setNumThreads, (1,)))
            written = pool.map(task, made, chunksize=max(1, min(8, len(made) // (4 * workers))))
        for digest in written:
            hashes.append(digest)
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
    least, most = SIZES
    for name, value, is_valid, advice in (
        ("images", images, images >= 1, "ask for at least 1"),
        ("size", size, least <= size <= most, f"choose {least} to {most} px, the longer side of an image"),
        ("corrupt", corrupt, 0 <= corrupt <= images, f"choose 0 to {images}, the number of images"),
        ("seed", seed, 0 <= seed < 1 << 63, "choose 0 or a positive number below 2**63"),
        ("workers", workers, workers >= 1, "ask for at least 1"),
    ):
        if not is_valid:
            raise RunError(f"{name} is {value}: {advice}")


def synth(
    out: Path, images: int = 600, size: int = 1024, seed: int = 0, corrupt: int = 0, workers: int | None = None
) -> dict[str, int]:
    """Write a phantom MIMIC-CXR-JPG tree into `out`; returns its counts: images, studies, patients, corrupt.

    `size`: longer side in pixels. `corrupt`: images to damage (truncated, empty, not a JPEG, in turn).
    `workers`: processes, by default one per core. Same arguments, same bytes, whatever `workers` is.
    Raises RunError for arguments out of range, for an `out` that is not empty, and where writing fails.
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
            f"{out}: a worker process died, perhaps out of memory: empty the folder and use fewer than {workers} "
            "workers (scripts need `if __name__ == '__main__':`)"
        ) from error
    return {
        "images": images,
        "studies": len({image.study for image in made}),
        "patients": len({image.patient for image in made}),
        "corrupt": corrupt,
    }
