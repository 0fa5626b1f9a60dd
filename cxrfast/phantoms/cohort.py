"""The patients to draw, their studies and images, and the findings of each study. Pure.

Each object draws its random numbers from its own stream, keyed by the seed and the object.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

from cxrfast.phantoms.findings import FINDINGS

DAMAGE = ("truncated", "empty", "not a JPEG")
"""How the `corrupt` images are damaged, in turn."""

VIEWS = {
    ("AP",): 0.40,
    ("PA",): 0.25,
    ("AP", "AP"): 0.13,
    ("PA", "AP"): 0.07,
    ("PA", "LATERAL"): 0.12,
    ("AP", "PA", "LATERAL"): 0.03,
}
"""Views of a study and their probability; one image in ten is a lateral."""


@dataclass(frozen=True)
class Image:
    """One image to draw. `patient`, `study` and `index` count from 0 and key the random streams."""

    index: int
    patient: int
    study: int
    subject_id: int
    study_id: int
    dicom_id: str
    view: str
    height: int
    width: int
    present: tuple[str, ...]
    """Findings of the study, in the order of FINDINGS."""
    date: int
    time: float
    damage: str = ""

    @property
    def path(self) -> str:
        subject = f"p{self.subject_id}"
        return f"files/{subject[:3]}/{subject}/s{self.study_id}/{self.dicom_id}.jpg"


def stream(seed: int, domain: str, index: int = 0) -> np.random.Generator:
    """Random numbers for one object: the same in any process, whatever else is drawn."""
    number = ("set", "patient", "study", "image", "labels").index(domain)
    return np.random.Generator(np.random.Philox(key=np.array([seed, number << 40 | index], np.uint64)))


def make_cohort(images: int, size: int, seed: int = 0, corrupt: int = 0) -> list[Image]:
    """Patients with one to four studies of one to three views, until `images` images are reached. Pure."""
    rng = stream(seed, "set")
    subjects = _ids(rng, 10_000_000, images)
    studies = _ids(rng, 50_000_000, images)
    damaged = {int(i): DAMAGE[n % len(DAMAGE)] for n, i in enumerate(rng.permutation(images)[:corrupt])}
    made: list[Image] = []
    study = -1
    for patient in range(images):
        year = int(rng.integers(0, 90))
        for visit in range(min(4, int(rng.geometric(0.55)))):
            study += 1
            present = tuple(name for name, finding in FINDINGS.items() if rng.random() < finding.prevalence)
            views = list(VIEWS)[rng.choice(len(VIEWS), p=list(VIEWS.values()))]
            date = 21_000_101 + 10_000 * (year + visit) + 100 * int(rng.integers(12)) + int(rng.integers(28))
            minute = int(rng.integers(0, 24 * 60 - 5))
            for number, view in enumerate(views):
                if len(made) == images:
                    return made
                height, width = _shape(rng, size, view)
                digest = hashlib.sha256(f"{seed}/{len(made)}".encode()).hexdigest()
                dicom_id = "-".join(digest[i : i + 8] for i in range(0, 40, 8))
                hour, past = divmod(minute + number, 60)
                time = hour * 10_000 + past * 100 + int(rng.integers(0, 480)) / 8
                keys = (len(made), patient, study, subjects[patient], studies[study], dicom_id)
                damage = damaged.get(len(made), "")
                made.append(Image(*keys, view, height, width, present, date, time, damage))
    return made


def _ids(rng: np.random.Generator, first: int, n: int) -> list[int]:
    """`n` distinct numbers of eight digits, in random order."""
    gaps = rng.integers(1, max(2, 2 * 4_999_999 // n), n)
    return [int(i) for i in rng.permutation(first + np.cumsum(gaps))]


def _shape(rng: np.random.Generator, size: int, view: str) -> tuple[int, int]:
    """Height and width: portrait, landscape, or now and then an odd ratio."""
    kind = rng.random()
    ratio = rng.uniform(0.74, 1.0) if kind > 0.93 else rng.choice([0.818, 0.82, 0.832])
    short = round(size * float(ratio))
    return (short, size) if 0.62 < kind <= 0.93 and view != "LATERAL" else (size, short)
