"""A folder of films and a spreadsheet export as a clinic may have them, laid out as docs/your-own-data.md says."""

import csv
import io
import tarfile
import zlib
from pathlib import Path

from pictures import noise
from PIL import Image
from sets import REAL

HEADER = ("Filename", "PatientNr", "Age", "Sex", "Scanner", "Pneumonia", "Bacterial")
SCANNERS = ("Canon CXDI", "Philips DigitalDiagnost", "")

EVERY, NEW = 9, 40
"""Of the patients, sorted, each EVERY-th is in the table; NEW films of the others are new ones."""


def real_clinic(folder: Path) -> None:
    """655 real radiographs of 317 children (../shared/real) and 40 new ones. Age, sex and scanner are invented."""
    with open(REAL / "kermany224.csv", encoding="utf-8") as file:
        listed = list(csv.DictReader(file))
    known = set(sorted({film["patient_id"] for film in listed})[::EVERY])
    mine = {film["file"]: film for film in listed if film["patient_id"] in known}
    new = [film["file"] for film in listed if film["patient_id"] not in known][::100][:NEW]
    with tarfile.open(REAL / "kermany224.tar") as archive:
        wanted = {Path(member.name).name: member for member in archive if member.isfile()}
        read = {name: archive.extractfile(wanted[name]).read() for name in (*mine, *new)}  # type: ignore[union-attr]
    lines = [_line(name, mine[name]["patient_id"], mine[name]["finding"]) for name in wanted if name in mine]
    _write(folder, lines, read, new)


def small_clinic(folder: Path) -> None:
    """24 images of noise, of 12 patients, and 3 new ones."""
    read = {}
    for n in range(27):
        file = io.BytesIO()
        Image.fromarray(noise(160, 160, n)).save(file, "JPEG")
        read[f"film{n:02d}.jpeg"] = file.getvalue()
    findings = ("normal", "bacteria", "virus", "normal")
    lines = [_line(f"film{n:02d}.jpeg", f"n-{n // 2:04d}", findings[n % 4]) for n in range(24)]
    _write(folder, lines, read, list(read)[24:])


def _line(name: str, patient: str, finding: str) -> list[str]:
    """A line of the export."""
    chance = zlib.crc32(patient.encode())
    age = f"{1 + chance % 50 / 10:.1f}".replace(".", ",")
    bacterial = {"normal": "", "bacteria": "yes", "virus": "no"}[finding]
    return [name, patient, age, "FM"[chance % 2], SCANNERS[chance % 3], str(int(finding != "normal")), bacterial]


def _write(folder: Path, lines: list[list[str]], read: dict[str, bytes], new: list[str]) -> None:
    """Write films/2023, films/2024, export.csv (semicolons, decimal commas, a BOM, a bare last line) and new/.

    Two films are damaged, one new film is no image, and one film is in no line of the table.
    """
    for name in ("films/2023", "films/2024", "new"):
        (folder / name).mkdir(parents=True)
    for n, (name, *_) in enumerate(lines):
        data = {5: b"", 9: read[name][:3000]}.get(n, read[name])
        (folder / "films" / ("2024" if n % 2 else "2023") / name).write_bytes(data)
    for name in new:
        (folder / "new" / name).write_bytes(read[name])
    (folder / "new" / "damaged.jpeg").write_bytes(b"not an image")
    (folder / "films" / "2024" / "unlisted.jpeg").write_bytes(read[new[0]])
    (folder / "films" / "Thumbs.db").write_bytes(b"thumbnails")
    with open(folder / "export.csv", "w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file, delimiter=";").writerows([HEADER, *lines, [""] * len(HEADER)])
