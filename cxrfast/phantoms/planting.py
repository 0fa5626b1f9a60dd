"""Where a study's findings are in its patient, and their outlines in mm. Pure."""

from dataclasses import dataclass

import numpy as np

from cxrfast.phantoms.anatomy import LUNG, Anatomy, chest_wall, dome, lateral_ribs, ribs
from cxrfast.phantoms.findings import FINDINGS
from cxrfast.phantoms.geometry import disc, mirror, smooth


@dataclass(frozen=True)
class Placement:
    """Place and size of each finding in a study, whether present or not: all its views show the same ones.

    Places in a lung are (side, u, v): side -1 is the image's left, u runs from 0 (medial; in a lateral view,
    anterior) to 1 (lateral; posterior), v from 0 (apex) to 1 (diaphragm).
    """

    fluid: tuple[float, float]
    """mm of fluid at the lateral wall above the dome, on the image's left and right; 0 for none"""
    patch: tuple[int, float, float, float]
    """side, u, v, diameter in mm"""
    nodule: tuple[int, float, float, float]
    """side, u, v, diameter in mm"""
    device: int
    """0 to 2, see `devices`"""
    pleura: tuple[int, float]
    """side, mm inside the lung's border"""
    breaks: tuple[int, int, int, float]
    """side, first rib, number of ribs, fraction of the way from spine to chest wall"""
    wobble: tuple[float, ...]
    """Radii of the patch's outline, relative to its radius."""

    @classmethod
    def of(cls, rng: np.random.Generator) -> "Placement":
        def size(name: str) -> float:
            return float(rng.uniform(FINDINGS[name].low, FINDINGS[name].high))

        def side() -> int:
            return int(rng.choice([-1, 1]))

        where = rng.choice(3, p=[0.35, 0.35, 0.30])
        left, right = size("Pleural Effusion"), size("Pleural Effusion")
        return cls(
            fluid=(0.0 if where == 1 else left, 0.0 if where == 0 else right),
            patch=(side(), rng.uniform(0.4, 0.7), rng.uniform(0.28, 0.5), size("Lung Opacity")),
            nodule=(side(), rng.uniform(0.45, 0.85), rng.uniform(0.2, 0.5), size("Lung Lesion")),
            device=int(rng.integers(0, 3)),
            pleura=(side(), rng.uniform(9, 20)),
            breaks=(side(), int(rng.integers(2, 5)), int(rng.integers(2, 5)), rng.uniform(0.45, 0.8)),
            wobble=tuple(float(r) for r in rng.uniform(0.85, 1.1, 9)),
        )


def effusions(p: Placement, present: tuple[str, ...]) -> list[int]:
    """Sides with fluid; none if the study has no effusion."""
    return [side for side, height in zip((-1, 1), p.fluid, strict=True) if height and "Pleural Effusion" in present]


def fluid_outline(a: Anatomy, p: Placement, side: int, x: tuple[float, float]) -> np.ndarray:
    """Fluid over the dome of a side, up to a meniscus that climbs from x[0] to x[1]."""
    level, bottom = dome(a, side) - p.fluid[0 if side < 0 else 1], a.angle + 12
    t = np.linspace(0, 1, 24)
    surface = np.stack([x[0] + t * (x[1] - x[0]), level + 22 * (1 - t**3)], axis=1)
    return np.vstack([surface, [(x[1], bottom), (x[0], bottom)]])


def patch_outline(a: Anatomy, p: Placement, view: str) -> np.ndarray:
    """The irregular border of the lung opacity."""
    turn = np.linspace(0, 2 * np.pi, len(p.wobble), endpoint=False)
    radius = p.patch[3] / 2 * np.array(p.wobble)
    border = np.stack([radius * np.cos(turn), radius * np.sin(turn)], axis=1)
    return smooth(border + in_lung(a, p.patch, view))


def nodule_outline(a: Anatomy, p: Placement, view: str) -> np.ndarray:
    x, y = in_lung(a, p.nodule, view)
    return disc(x, y, p.nodule[3] / 2, p.nodule[3] / 2)


def in_lung(a: Anatomy, place: tuple[int, float, float, float], view: str) -> tuple[float, float]:
    """(x, y) of a place (side, u, v, anything) in the lungs."""
    side, u, v, _ = place
    y = a.apex + v * (dome(a, side) - a.apex)
    return (-75 + 150 * u, y) if view == "LATERAL" else (side * (24 + u * (float(chest_wall(a, y)) - 24)), y)


def pleural_line(a: Anatomy, p: Placement, view: str) -> np.ndarray:
    """The visceral pleura off the chest wall: around the apex, down the lateral border, in the lung."""
    side, inset = p.pleura
    if view == "LATERAL":
        t = np.linspace(-2.5, -0.5, 24)
        return np.stack([5 + (72 - inset) * np.cos(t), a.apex + 95 + (82 - inset) * np.sin(t)], axis=1)
    upper = LUNG[:5] * (a.angle - a.apex, a.half) + (a.apex, 0)  # y, x
    border = smooth(np.vstack([[(28, a.apex + 12)], upper[:, ::-1]]), closed=False)
    inwards = np.array([62, a.apex + 110]) - border
    return mirror(border + inset * inwards / np.linalg.norm(inwards, axis=1, keepdims=True), side)


def hairlines(a: Anatomy, p: Placement, view: str) -> list[np.ndarray]:
    """Fractures: oblique steps across neighbouring ribs."""
    side, first, number, share = p.breaks
    found = []
    for rib in (lateral_ribs(a) if view == "LATERAL" else ribs(a, side)[0])[first : first + number]:
        at = int(share * (len(rib) - 2))
        along = (rib[at + 1] - rib[at]) / np.linalg.norm(rib[at + 1] - rib[at])
        across = np.array([-along[1], along[0]])
        middle, reach = 1.2 * along, 5.5 * across + 1.5 * along
        found.append(rib[at] + np.stack([-reach - middle, -middle, middle, reach + middle]))
    return found
