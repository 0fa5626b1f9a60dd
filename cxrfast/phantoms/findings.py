"""What is planted: each finding with its size and how often it occurs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """A planted finding. `low` to `high` is its size in `unit`; `prevalence`, how many studies have it."""

    kind: str
    """`large` survives any downscaling, `middle` a moderate one, `fine` none."""
    low: float
    high: float
    unit: str
    prevalence: float
    text: str
    uncertain: float = 0.0
    """Share of its positives that the CSVs call uncertain (-1)."""


FINDINGS = {
    "Cardiomegaly": Finding(
        "large", 0.57, 0.64, "of the thorax's width", 0.33, "wide heart (0.41 to 0.48 without)", 0.03
    ),
    "Pleural Effusion": Finding(
        "large", 40, 100, "mm", 0.33, "fluid over the diaphragm, with a meniscus, one or both sides", 0.03
    ),
    "Lung Opacity": Finding("large", 60, 110, "mm", 0.30, "soft bright patch in a lung", 0.05),
    "Lung Lesion": Finding("middle", 10, 25, "mm", 0.28, "nodule in a lung", 0.05),
    "Support Devices": Finding("middle", 3, 3, "mm", 0.30, "catheter, tubes, or a pacemaker with its lead"),
    "Pneumothorax": Finding("fine", 1, 2, "px", 0.30, "bright pleural line along apex and lateral border"),
    "Fracture": Finding("fine", 1, 2, "px", 0.30, "dark hairlines across two to four ribs"),
}
"""What is planted, each independently. `No Finding` is 1 where none is; other labels have no positives."""
