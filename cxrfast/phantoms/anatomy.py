"""A patient's anatomy as curves: lungs, heart, ribs, vessels and body, seen from the front and from the side. Pure.

Lengths are in mm; x grows to the image's right (the patient's left), y downwards, and (0, 0) is between the lungs.
"""

from dataclasses import dataclass

import numpy as np

from cxrfast.phantoms.findings import FINDINGS
from cxrfast.phantoms.geometry import Points, mirror, smooth

LUNG = np.array([(0.0, 0.34), (0.05, 0.52), (0.15, 0.70), (0.32, 0.86), (0.52, 0.955), (0.74, 1.0), (1.0, 1.0)])
"""Lateral border of a lung: fraction of the way from apex to costophrenic angle, fraction of the half thorax."""


@dataclass(frozen=True)
class Anatomy:
    """Sizes that stay the same over a patient's studies, in mm unless stated otherwise."""

    half: float
    """Half the inner width of the thorax."""
    apex: float
    dome: tuple[float, float]
    """y of the diaphragm's domes: the patient's right, left."""
    angle: float
    """y of the costophrenic angles."""
    heart: tuple[float, float]
    """Cardiothoracic ratio without and with Cardiomegaly."""
    rib_step: float
    """From rib to rib."""
    rib_drop: float
    """Slope of the ribs relative to the usual one."""
    clavicle: float
    """Height of the clavicles below the usual one."""
    fat: float
    """0 for a thin patient, 1 for a heavy one."""
    breasts: bool
    bubble: float
    """Radius of the stomach's air bubble."""
    vessels: int
    """Seed of the vascular tree."""

    @classmethod
    def of(cls, rng: np.random.Generator) -> "Anatomy":
        dome = rng.uniform(68, 82)
        large = FINDINGS["Cardiomegaly"]
        return cls(
            half=rng.uniform(132, 145),
            apex=rng.uniform(-132, -120),
            dome=(dome, dome + rng.uniform(4, 12)),
            angle=dome + rng.uniform(36, 44),
            heart=(rng.uniform(0.41, 0.48), rng.uniform(large.low, large.high)),
            rib_step=rng.uniform(21.5, 24.5),
            rib_drop=rng.uniform(0.85, 1.2),
            clavicle=rng.uniform(-8, 8),
            fat=rng.uniform(0, 1),
            breasts=bool(rng.random() < 0.45),
            bubble=rng.uniform(8, 20),
            vessels=int(rng.integers(1 << 32)),
        )


def chest_wall(a: Anatomy, y: np.ndarray | float) -> np.ndarray:
    """Distance of the lung's lateral border from the midline at height `y`."""
    return a.half * np.interp((np.asarray(y) - a.apex) / (a.angle - a.apex), LUNG[:, 0], LUNG[:, 1])


def dome(a: Anatomy, side: int) -> float:
    return a.dome[0 if side < 0 else 1]


def lung(a: Anatomy, side: int) -> np.ndarray:
    y, d = a.apex + LUNG[:, 0] * (a.angle - a.apex), dome(a, side)
    lateral = np.stack([a.half * LUNG[:, 1], y], axis=1)
    outer = [(a.half - 6, a.angle - 2), (0.87 * a.half, d + 16), (0.68 * a.half, d + 2)]
    inner = [(0.46 * a.half, d - 2), (0.26 * a.half, d + 8), (21, d + 14)]
    medial = [(20, 30), (19, -40), (21, a.apex + 38), (28, a.apex + 12)]
    return mirror(smooth(np.vstack([lateral, outer, inner, medial])), side)


def heart(a: Anatomy, ratio: float) -> list[np.ndarray]:
    """Outlines of the heart, `ratio` of the thorax wide, and of the great vessels above it."""
    width = 2 * a.half * ratio
    rx, lx, y, tall = -0.34 * width, 0.66 * width, (a.dome[0] + a.dome[1]) / 2, 0.55 * width + 24
    right = [(0.55 * rx, y - tall), (0.92 * rx, y - 0.72 * tall), (rx, y - 0.42 * tall), (0.93 * rx, y - 5)]
    base = [(0.6 * rx, y + 14), (0, y + 20), (0.5 * lx, y + 20), (0.83 * lx, y + 7), (lx, y - 16)]
    left = [(0.95 * lx, y - 0.42 * tall), (0.68 * lx, y - 0.75 * tall), (0.42 * lx, y - 1.02 * tall)]
    vena_cava = [(-22, -160), (-27, -90), (-30, -55), (-32, -20), (-25, 60)]
    pulmonary_trunk = [(25, 60), (36, -5), (38, -22), (33, -36)]
    aorta = [(37, -48), (38, -58), (32, -68), (25, -80), (25, -110), (22, -160)]
    return [smooth([*right, *base, *left]), smooth([*vena_cava, *pulmonary_trunk, *aorta])]


def ribs(a: Anatomy, side: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Centre lines of nine ribs: posterior parts, spine to chest wall; anterior parts of the upper seven."""
    back, front = [], []
    for n in range(9):
        y = a.apex + 2 + n * a.rib_step
        drop = a.rib_drop * (16 + 4.5 * n)
        x = float(chest_wall(a, y + drop)) + 2
        posterior = [(14, y), (0.32 * x, y - 7), (0.66 * x, y + 0.12 * drop), (0.9 * x, y + 0.55 * drop), (x, y + drop)]
        back.append(mirror(smooth(posterior, closed=False), side))
        if n < 7:
            end = y + drop + 34 + 4 * n
            anterior = [(x, y + drop), (0.96 * x, y + drop + 13), (0.78 * x, end - 8), (0.40 * x + 10, end)]
            front.append(mirror(smooth(anterior, closed=False), side))
    return back, front


def vascular_tree(a: Anatomy, hila: list[tuple[float, float, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Segments (N, 2, 2) and widths (N,) of the vessels of each hilum (x, y, side), both in mm.

    A hilum of side 0 is seen from the side: its vessels leave in all directions.
    """
    rng = np.random.Generator(np.random.Philox(a.vessels))
    starts = []
    for x, y, side in hila:
        for spread in np.linspace(-1.35, 1.45, 8) if side else np.linspace(0, 5.6, 10):
            hub = (0, 12 * spread) if side else (11 * np.cos(spread), 11 * np.sin(spread))
            starts.append((x + hub[0], y + hub[1], spread if side >= 0 else np.pi - spread))
    roots = np.array(starts)
    at, heading = roots[:, :2], roots[:, 2]
    width, length = rng.uniform(3.6, 5.2, len(at)), rng.uniform(70, 95, len(at))
    segments, widths = [], []
    while len(at):  # generation by generation; seven steps per branch, children at three of them
        headings = heading[:, None] + np.cumsum(rng.normal(0, 0.16, (len(at), 7)), axis=1)
        step = np.stack([np.cos(headings), np.sin(headings)], axis=2) * (length / 7)[:, None, None]
        path = np.concatenate([at[:, None], at[:, None] + np.cumsum(step, axis=1)], axis=1)
        thick = width[:, None] * 0.87 ** np.arange(7)
        segments.append(np.stack([path[:, :-1], path[:, 1:]], axis=2).reshape(-1, 2, 2))
        widths.append(thick.ravel())
        turn = rng.uniform(0.4, 0.8, (len(at), 3)) * rng.choice([-1, 1], (len(at), 3))
        keep = (thick[:, [1, 3, 5]] > 1.25).ravel()
        at, heading = path[:, [2, 4, 6]].reshape(-1, 2)[keep], (headings[:, [1, 3, 5]] + turn).ravel()[keep]
        width, length = 0.75 * thick[:, [1, 3, 5]].ravel()[keep], np.repeat(0.62 * length, 3)[keep]
    return np.concatenate(segments), np.concatenate(widths)


def trunk(a: Anatomy) -> list[np.ndarray]:
    """Outlines of neck with torso, and of the arms."""
    wall = a.half + 19 + 20 * a.fat
    shoulder = [(56, -260), (58, -190), (78, -166), (120, -153), (170, -140), (205, -118)]
    half = [*shoulder, (wall + 44, -95), (wall + 12, -62), (wall, -10), (wall - 3, 90), (wall + 4, 260)]
    arm = [(190, -130), (222, -95), (245, 0), (255, 240), (212, 240), (200, 0), (182, -70)]
    return [np.vstack([mirror(half, 1), mirror(half, -1)[::-1]]), mirror(arm, 1), mirror(arm, -1)]


def lower_body(a: Anatomy) -> Points:
    """Outline of the body below the diaphragm."""
    w = a.half + 10
    right, left = a.dome[0] + 6, a.dome[1] + 6
    return [(-w, a.angle), (-0.5 * w, right), (0.5 * w, left), (w, a.angle), (w, 260), (-w, 260)]


def lateral_lungs(a: Anatomy) -> np.ndarray:
    top, base = a.apex + 4, a.dome[0]
    front = [(0, base - 4), (-50, base), (-92, base + 16), (-96, base - 30), (-84, top + 80), (-50, top + 30)]
    back = [(8, top), (40, top + 8), (78, top + 50), (95, top + 110), (96, base - 10), (88, a.angle + 4)]
    return smooth([*back, (80, a.angle), (50, base + 12), *front])


def lateral_body(a: Anatomy) -> np.ndarray:
    front = [(-40, -240), (-42, -185), (-75, -150), (-112, -90), (-122 - 8 * a.fat, 0), (-118 - 16 * a.fat, 240)]
    back = [(132 + 8 * a.fat, 240), (126, 90), (132, -40), (112, -130), (70, -175), (56, -240)]
    return smooth([*front, *back])


def lateral_ribs(a: Anatomy) -> list[np.ndarray]:
    """Centre lines of ribs seen from the side, falling from the spine towards the sternum."""
    return [
        smooth([(98, y), (60, y + 22), (0, y + 62), (-62, y + 82)], closed=False)
        for y in a.apex + 12 + a.rib_step * np.arange(8)
    ]
