"""A phantom radiograph: anatomy of a patient, findings of known physical size, drawn at native resolution. Pure.

Large findings survive any downscaling; fine ones are one to two native pixels wide and keep the local mean, so that
nothing of them is left at low resolution.

Lengths are in mm. The longer side of every image is 430 mm; x grows to the image's right (the patient's left), y
downwards, and (0, 0) lies between the lungs. Attenuation is what is summed up: 0 air, about 1 bone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

FIELD = 430.0
"""mm over the longer side of an image."""


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

Points = Sequence[tuple[float, float]] | np.ndarray
"""(N, 2) of x and y in mm."""


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
    """The random numbers of one thing: the same whichever process draws it, and whatever else is drawn."""
    number = ("set", "patient", "study", "image", "labels").index(domain)
    return np.random.Generator(np.random.Philox(key=np.array([seed, number << 40 | index], np.uint64)))


# ── the patient ─────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Anatomy:
    """What stays the same over a patient's studies, in mm unless said otherwise."""

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
    """How steeply the ribs fall, as a share of the usual."""
    clavicle: float
    """How much lower than usual the clavicles are."""
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


@dataclass(frozen=True)
class Placement:
    """Where and how large a study's findings are, were they present: all views of a study show the same ones.

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
    """side, first rib, number of ribs, share of the way from spine to chest wall"""
    wobble: tuple[float, ...]
    """Radii of the patch's outline, as shares of its radius."""

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


# ── drawing: mm in, masks in 0..1 out ───────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Frame:
    """A grid of pixels over the patient, who lies `shift` mm off its centre, turned by `angle` radians."""

    height: int
    width: int
    shift: tuple[float, float] = (0.0, 0.0)
    angle: float = 0.0

    @property
    def scale(self) -> float:
        """Pixels per mm."""
        return max(self.height, self.width) / FIELD

    def pixels(self, points: Points) -> np.ndarray:
        """(N, 2) mm → (N, 1, 2) int32 in sixteenths of a pixel, as cv2 draws with shift=4."""
        c, s = np.cos(self.angle), np.sin(self.angle)
        placed = (np.asarray(points, float) @ np.array([[c, s], [-s, c]]) + self.shift) * self.scale
        centre = np.array([self.width / 2 - 0.5, self.height / 2 - 0.5])
        return np.rint(16 * (placed + centre)).astype(np.int32)[:, None]

    def blur(self, mask: np.ndarray, mm: float) -> np.ndarray:
        """uint8 mask → float32 in 0..1 with edges of `mm` (sigma). Wide blurs are done on fewer pixels."""
        sigma = max(mm * self.scale, 0.3)
        part = 4 if sigma > 4 else 2 if sigma > 2 else 1
        if part > 1:
            mask = cv2.resize(mask, (self.width // part, self.height // part), interpolation=cv2.INTER_AREA)
        soft = cv2.GaussianBlur(mask, (0, 0), sigma / part, borderType=cv2.BORDER_REPLICATE)
        soft = soft * np.float32(1 / 255)
        return cv2.resize(soft, (self.width, self.height)) if part > 1 else soft

    def areas(self, outlines: Sequence[Points], blur: float) -> np.ndarray:
        """Filled outlines."""
        mask = np.zeros((self.height, self.width), np.uint8)
        for outline in outlines:
            cv2.fillPoly(mask, [self.pixels(outline)], 255, cv2.LINE_AA, 4)
        return self.blur(mask, blur)

    def bands(self, lines: Sequence[Points], width: float, blur: float, core: float = 1.0) -> np.ndarray:
        """Lines of `width` mm; inside their walls the value is `core`, as in a bone with its cortex."""
        mask = np.zeros((self.height, self.width), np.uint8)
        for share, value in ((1.0, 255), (0.62, round(255 * core)))[: 1 if core == 1.0 else 2]:
            for line in lines:
                thick = max(1, round(width * share * self.scale))
                cv2.polylines(mask, [self.pixels(line)], False, value, thick, cv2.LINE_AA, 4)
        return self.blur(mask, blur)


def smooth(points: Points, closed: bool = True, steps: int = 8) -> np.ndarray:
    """Catmull-Rom curve through the points: (M, 2), `steps` points for each of theirs."""
    p = np.asarray(points, float)
    p = np.vstack([p[-1:], p, p[:2]]) if closed else np.vstack([2 * p[:1] - p[1:2], p, 2 * p[-1:] - p[-2:-1]])
    a, b, c, d = p[:-3], p[1:-2], p[2:-1], p[3:]
    t = np.linspace(0, 1, steps, endpoint=False)[:, None, None]
    curve = b + 0.5 * t * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)))
    curve = curve.transpose(1, 0, 2).reshape(-1, 2)
    return curve if closed else np.vstack([curve, p[-2:-1]])


def mirror(points: Points, side: float) -> np.ndarray:
    """The same on the other side of the body where `side` is -1."""
    return np.asarray(points, float) * (side, 1.0)


# ── the anatomy as curves ───────────────────────────────────────────────────────────────────────────────

LUNG = np.array([(0.0, 0.34), (0.05, 0.52), (0.15, 0.70), (0.32, 0.86), (0.52, 0.955), (0.74, 1.0), (1.0, 1.0)])
"""Lateral border of a lung: share of the way from apex to costophrenic angle, share of the half thorax."""


def chest_wall(a: Anatomy, y: np.ndarray | float) -> np.ndarray:
    """Distance of the lung's lateral border from the midline at height `y`."""
    return a.half * np.interp((np.asarray(y) - a.apex) / (a.angle - a.apex), LUNG[:, 0], LUNG[:, 1])


def dome(a: Anatomy, side: int) -> float:
    return a.dome[0 if side < 0 else 1]


def lung(a: Anatomy, side: int) -> np.ndarray:
    y, d = a.apex + LUNG[:, 0] * (a.angle - a.apex), dome(a, side)
    lateral = np.stack([a.half * LUNG[:, 1], y], axis=1)
    base = [
        (a.half - 6, a.angle - 2),
        (0.87 * a.half, d + 16),
        (0.68 * a.half, d + 2),
        (0.46 * a.half, d - 2),
        (0.26 * a.half, d + 8),
        (21, d + 14),
    ]
    medial = [(20, 30), (19, -40), (21, a.apex + 38), (28, a.apex + 12)]
    return mirror(smooth(np.vstack([lateral, base, medial])), side)


def heart(a: Anatomy, ratio: float) -> list[np.ndarray]:
    """Outlines of the heart, `ratio` of the thorax wide, and of the great vessels above it."""
    width = 2 * a.half * ratio
    r, left, y, tall = -0.34 * width, 0.66 * width, (a.dome[0] + a.dome[1]) / 2, 0.55 * width + 24
    body = [
        (0.55 * r, y - tall),
        (0.92 * r, y - 0.72 * tall),
        (r, y - 0.42 * tall),
        (0.93 * r, y - 5),
        (0.6 * r, y + 14),
        (0, y + 20),
        (0.5 * left, y + 20),
        (0.83 * left, y + 7),
        (left, y - 16),
        (0.95 * left, y - 0.42 * tall),
        (0.68 * left, y - 0.75 * tall),
        (0.42 * left, y - 1.02 * tall),
    ]
    vessels = [
        (-22, -160),
        (-27, -90),
        (-30, -55),
        (-32, -20),
        (-25, 60),
        (25, 60),
        (36, -5),
        (38, -22),
        (33, -36),
        (37, -48),
        (38, -58),
        (32, -68),
        (25, -80),
        (25, -110),
        (22, -160),
    ]
    return [smooth(body), smooth(vessels)]


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
    while len(at):  # one generation of branches after the other; seven steps each, children at three of them
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


# ── the views ───────────────────────────────────────────────────────────────────────────────────────────


def draw_vessels(frame: Frame, tree: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    mask = np.zeros((frame.height, frame.width), np.uint8)
    ends = frame.pixels(tree[0].reshape(-1, 2)).reshape(-1, 2, 1, 2)
    thick = np.ceil(tree[1] * 1.5).astype(int)  # classes of 2/3 mm, drawn wide over thin
    for k in np.unique(thick):
        cv2.polylines(
            mask,
            list(ends[thick == k]),
            False,
            min(255, 60 + 25 * int(k)),
            max(1, round(k / 1.5 * frame.scale)),
            cv2.LINE_AA,
            4,
        )
    return frame.blur(mask, 0.7)


def fluid_outline(x: tuple[float, float], level: float, bottom: float) -> np.ndarray:
    """Fluid from `bottom` up to a meniscus that climbs from x[0] to x[1], where it stands at `level`."""
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


def disc(x: float, y: float, rx: float, ry: float) -> np.ndarray:
    turn = np.linspace(0, 2 * np.pi, 32, endpoint=False)
    return np.stack([x + rx * np.cos(turn), y + ry * np.sin(turn)], axis=1)


def in_lung(a: Anatomy, place: tuple[int, float, float, float], view: str) -> tuple[float, float]:
    """(x, y) of a place (side, u, v, anything) in the lungs."""
    side, u, v, _ = place
    y = a.apex + v * (dome(a, side) - a.apex)
    return (-75 + 150 * u, y) if view == "LATERAL" else (side * (24 + u * (float(chest_wall(a, y)) - 24)), y)


def frontal(frame: Frame, a: Anatomy, p: Placement, present: tuple[str, ...], ap: bool) -> np.ndarray:
    """Attenuation of a PA or AP view, but for fine findings. (H, W) float32."""
    lungs = frame.areas([lung(a, -1), lung(a, 1)], 1.3)
    ratio = a.heart[1 if "Cardiomegaly" in present else 0]
    centre = frame.areas(heart(a, ratio), 1.6)
    tissue = frame.areas(trunk(a), 2.5)
    depth = tissue * (0.34 + 0.30 * frame.blur((tissue * 255).astype(np.uint8), 22))
    image = depth + (0.03 * a.fat) * tissue
    tree = draw_vessels(frame, vascular_tree(a, [(-34, -12, -1), (34, -20, 1)]))
    hila = frame.areas([disc(-36, -8, 13, 24), disc(37, -18, 12, 22)], 6)
    air = lungs * (1 - 0.93 * centre)
    fluid = np.zeros_like(air)
    if "Pleural Effusion" in present:
        wet = [
            mirror(fluid_outline((18, a.half + 2), dome(a, side) - height, a.angle + 12), side)
            for side, height in zip((-1, 1), p.fluid, strict=True)
            if height
        ]
        fluid = frame.areas(wet, 2.2)
        air *= 1 - fluid
    image -= air * (0.415 - 0.125 * tree - 0.09 * hila)
    image += 0.05 * centre + 0.08 * np.maximum(frame.areas([lower_body(a)], 6), fluid)
    if "Lung Opacity" in present:
        image += 0.26 * frame.areas([patch_outline(a, p, "AP")], 6) * air
    if "Lung Lesion" in present:
        image += 0.20 * frame.areas([nodule_outline(a, p, "AP")], 0.8)
    image += bones(frame, a, ap)
    image -= (
        0.10
        * frame.bands([[(0, -230), (1, -120), (3, -58)], [(3, -58), (-26, -32)], [(3, -58), (32, -38)]], 15, 2.0)
        * tissue
    )
    image -= 0.30 * frame.areas([disc(60, a.dome[1] + a.bubble + 12, 1.7 * a.bubble, a.bubble)], 2)
    if "Support Devices" in present:
        image += devices(frame, p.device, a)
    return image


def trunk(a: Anatomy) -> list[np.ndarray]:
    """Outlines of neck with torso, and of the arms."""
    wall = a.half + 19 + 20 * a.fat
    half = [
        (56, -260),
        (58, -190),
        (78, -166),
        (120, -153),
        (170, -140),
        (205, -118),
        (wall + 44, -95),
        (wall + 12, -62),
        (wall, -10),
        (wall - 3, 90),
        (wall + 4, 260),
    ]
    arm = [(190, -130), (222, -95), (245, 0), (255, 240), (212, 240), (200, 0), (182, -70)]
    return [np.vstack([mirror(half, 1), mirror(half, -1)[::-1]]), mirror(arm, 1), mirror(arm, -1)]


def lower_body(a: Anatomy) -> Points:
    """What lies below the diaphragm."""
    w = a.half + 10
    right, left = a.dome[0] + 6, a.dome[1] + 6
    return [(-w, a.angle), (-0.5 * w, right), (0.5 * w, left), (w, a.angle), (w, 260), (-w, 260)]


def bones(frame: Frame, a: Anatomy, ap: bool) -> np.ndarray:
    """Ribs, clavicles, spine, shoulder blades and upper arms. An AP view shows the blades over the lungs."""
    pairs = [ribs(a, side) for side in (-1, 1)]
    bone = 0.105 * frame.bands([r for back, _ in pairs for r in back], 8.5, 0.8, core=0.6)
    bone += 0.065 * frame.bands([r for _, front in pairs for r in front], 10.5, 1.0, core=0.6)
    lift = a.clavicle - (10 if ap else 0)
    collar = smooth([(15, lift - 98), (48, lift - 103), (92, lift - 122), (138, lift - 134)], closed=False)
    bone += 0.13 * frame.bands([collar, mirror(collar, -1)], 10.5, 0.9, core=0.65)
    x = 112 if ap else 134
    blade = [(x + 8, -118), (x + 40, -112), (x + 34, -60), (x + 22, 15), (x + 8, -40), (x, -80)]
    arm = np.vstack([disc(182, -112, 23, 23)[16:], [(208, -90), (228, 40), (204, 40), (170, -85)]])
    pieces = [mirror(smooth(blade), s) for s in (-1, 1)]
    bone += 0.055 * frame.areas(pieces, 2) + 0.12 * frame.areas([mirror(arm, s) for s in (-1, 1)], 1.5)
    spine = [[(x, y - 2.5), (x, y + 2.5)] for y in np.arange(-220, 240, a.rib_step) for x in (-8, 8)]
    bone += 0.05 * frame.bands([[(0, -240), (0, 240)]], 38, 3)
    bone += 0.045 * frame.bands(spine, 15, 1.6)
    if a.breasts:
        bone += 0.05 * frame.areas([disc(s * 82, 62, 52, 46) for s in (-1, 1)], 5)
    return bone


def devices(frame: Frame, kind: int, a: Anatomy) -> np.ndarray:
    """0: a central venous catheter; 1: a tracheal and a gastric tube; 2: a pacemaker with its lead."""
    lines: list[Points]
    if kind == 0:
        lines = [[(-70, -190), (-58, -140), (-34, -108), (-22, -80), (-20, -30), (-17, 10)]]
    elif kind == 1:
        lines = [[(4, -230), (2, -120), (2, -82)], [(-3, -230), (-2, -100), (6, 0), (16, 70), (44, 110)]]
    else:
        lines = [[(92, -78), (62, -98), (30, -96), (-12, -70), (-20, -10), (-5, 40), (35, a.dome[0] - 8)]]
    drawn = frame.bands([smooth(line, closed=False) for line in lines], FINDINGS["Support Devices"].low, 0.4)
    if kind == 2:
        box = smooth([(78, -92), (100, -98), (120, -90), (122, -68), (100, -58), (79, -68)])
        drawn += 1.2 * frame.areas([box], 0.5)
    return np.float32(0.33) * drawn


def lateral(frame: Frame, a: Anatomy, p: Placement, present: tuple[str, ...]) -> np.ndarray:
    """Attenuation of a lateral view, the patient facing left, but for fine findings. (H, W) float32."""
    base = a.dome[0]
    lungs = frame.areas([lateral_lungs(a)], 1.5)
    ratio = a.heart[1 if "Cardiomegaly" in present else 0]
    rx = 0.31 * 2 * a.half * ratio
    vessels = smooth([(-20, -60), (5, -75), (22, -60), (24, 10), (5, 20), (-30, 0)])
    centre = frame.areas([disc(-88 + rx, base - 0.95 * rx + 6, rx, 1.12 * rx), vessels], 3)
    tissue = frame.areas([lateral_body(a)], 2.5)
    image = tissue * (0.36 + 0.28 * frame.blur((tissue * 255).astype(np.uint8), 22))
    air = lungs * (1 - 0.75 * centre)
    fluid = np.zeros_like(air)
    if "Pleural Effusion" in present:
        wet = [
            fluid_outline((-98, 104), dome(a, side) - height, a.angle + 12)
            for side, height in zip((-1, 1), p.fluid, strict=True)
            if height
        ]
        fluid = frame.areas(wet, 2.2)
        air *= 1 - fluid
    image -= air * (0.37 - 0.11 * draw_vessels(frame, vascular_tree(a, [(2, -22, 0)])))
    belly = [(-130, base + 8), (70, base + 14), (130, a.angle), (130, 260), (-130, 260)]
    image += 0.08 * np.maximum(frame.areas([belly], 7), fluid) * tissue
    if "Lung Opacity" in present:
        image += 0.24 * frame.areas([patch_outline(a, p, "LATERAL")], 6) * air
    if "Lung Lesion" in present:
        image += 0.20 * frame.areas([nodule_outline(a, p, "LATERAL")], 0.8)
    spine = [
        [(x - 7, y), (x + 7, y + 1)] for y in np.arange(-210, 240, a.rib_step) for x in [84 - 0.0013 * (y - 20) ** 2]
    ]
    image += 0.09 * frame.bands(spine, 0.78 * a.rib_step, 1.0, core=0.7)
    image += 0.07 * frame.bands(lateral_ribs(a), 8.5, 0.9, core=0.6)
    image += 0.08 * frame.bands([[(-62, -112), (-88, -60), (-102, 20)]], 9, 1, core=0.6)
    shoulder = smooth([(-10, -230), (60, -230), (44, -140), (20, -118), (-6, -140)])
    image += 0.16 * frame.areas([shoulder], 7)
    image -= 0.10 * frame.bands([[(-14, -225), (2, -120), (10, -40)]], 14, 2) * tissue
    if "Support Devices" in present:
        tubes = [
            [(-30, -170), (-22, -80), (-18, 10)],
            [(-8, -230), (4, -120), (12, -20), (30, 60), (10, 110)],
            [(-90, -80), (-40, -105), (-12, -60), (-30, 10), (-55, 40)],
        ]
        tube = smooth(tubes[p.device], closed=False)
        image += 0.33 * frame.bands([tube], FINDINGS["Support Devices"].low, 0.4)
    return image


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
    """Ribs seen from the side fall from the spine towards the sternum."""
    return [
        smooth([(98, y), (60, y + 22), (0, y + 62), (-62, y + 82)], closed=False)
        for y in a.apex + 12 + a.rib_step * np.arange(8)
    ]


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


def fine(frame: Frame, lines: list[np.ndarray], levels: float) -> np.ndarray:
    """Grey levels that lines of one to two pixels add to an image. float32.

    The surroundings are darkened by as much as the lines are brightened (or the reverse), as digital
    radiography's edge enhancement does: the mean of any larger square stays, reduced images hold no trace.
    """
    mask = np.zeros((frame.height, frame.width), np.uint8)
    for line in lines:
        cv2.polylines(mask, [frame.pixels(line)], False, 255, 1, cv2.LINE_AA, 4)
    line_only = mask.astype(np.float32)
    return (line_only - cv2.blur(line_only, (7, 7), borderType=cv2.BORDER_REFLECT)) * np.float32(levels / 255)


def draw(image: Image, seed: int) -> np.ndarray:
    """The radiograph of `image`: uint8 (height, width), 0 for air.

    All random numbers are drawn whatever is present: with and without a finding, all else is equal.
    Large structures are drawn at 256 to 512 pixels and enlarged; fine findings and noise at native size.
    """
    anatomy = Anatomy.of(stream(seed, "patient", image.patient))
    placement = Placement.of(stream(seed, "study", image.study))
    rng = stream(seed, "image", image.index)
    shift, angle = (rng.uniform(-8, 8), rng.uniform(-7, 9)), float(np.radians(rng.uniform(-2.5, 2.5)))
    native = Frame(image.height, image.width, shift, angle)
    reduced = min(512, max(256, max(image.height, image.width))) / max(image.height, image.width)
    coarse = Frame(round(image.height * reduced), round(image.width * reduced), shift, angle)
    if image.view == "LATERAL":
        layers = lateral(coarse, anatomy, placement, image.present)
    else:
        layers = frontal(coarse, anatomy, placement, image.present, image.view == "AP")
    grey = expose(layers, rng)
    if grey.shape != (image.height, image.width):
        how = cv2.INTER_AREA if reduced > 1 else cv2.INTER_CUBIC
        grey = cv2.resize(grey, (image.width, image.height), interpolation=how)
    grey += rng.standard_normal(grey.shape, np.float32) * np.float32(rng.uniform(1.4, 2.2))
    if "Pneumothorax" in image.present:
        grey += fine(native, [pleural_line(anatomy, placement, image.view)], 42)
    if "Fracture" in image.present:
        grey += fine(native, hairlines(anatomy, placement, image.view), -60)
    return np.clip(np.rint(grey), 0, 255).astype(np.uint8)


def expose(attenuation: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Attenuation → grey levels, float32: uneven tissue, exposure, a film's shoulder for what is dense."""
    h, w = attenuation.shape
    for cells, strength in ((5, 0.030), (24, 0.014), (90, 0.010)):
        noise = rng.standard_normal((cells, cells), np.float32) * np.float32(strength)
        uneven = cv2.resize(noise, (w, h), interpolation=cv2.INTER_CUBIC)
        attenuation = attenuation + uneven * (attenuation > 0.1)  # air stays even
    gain, gamma, offset = rng.uniform(0.93, 1.07), rng.uniform(1.5, 1.75), rng.uniform(0, 10)
    film = np.maximum(attenuation, 0) ** np.float32(gamma) * np.float32(2.6 * gain)
    return (np.float32(offset) + 244 * (1 - np.exp(-film))).astype(np.float32)
