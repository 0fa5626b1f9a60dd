"""The planted findings: each with its size and prevalence."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """A planted finding."""

    kind: str
    """`large` survives any downscaling, `middle` a moderate one, `fine` none."""
    low: float
    """Smallest size: mm; for `fine` ones pixels; for Cardiomegaly the cardiothoracic ratio."""
    high: float
    """Largest size."""
    prevalence: float
    """Fraction of the studies that have it."""
    uncertain: float = 0.0
    """Fraction of its positives that the CSVs call uncertain (-1)."""


FINDINGS = {
    "Cardiomegaly": Finding("large", 0.57, 0.64, 0.33, 0.03),  # a wide heart: 0.41 to 0.48 without
    "Pleural Effusion": Finding("large", 40, 100, 0.33, 0.03),  # fluid over one or both domes, with a meniscus
    "Lung Opacity": Finding("large", 60, 110, 0.30, 0.05),  # soft bright patch in a lung
    "Lung Lesion": Finding("middle", 10, 25, 0.28, 0.05),  # nodule in a lung
    "Support Devices": Finding("middle", 3, 3, 0.30),  # catheter, tubes, or a pacemaker with its lead
    "Pneumothorax": Finding("fine", 1, 2, 0.30),  # bright pleural line along apex and lateral border
    "Fracture": Finding("fine", 1, 2, 0.30),  # dark hairlines across two to four ribs
}
"""The planted findings, each independent of the others. `No Finding` is 1 where none is; other labels have no positives."""
