"""The pixels of a phantom radiograph, drawn at native resolution. Pure.

Large findings survive any downscaling; fine ones are one to two native pixels wide and keep the local mean, so they
vanish at low resolution. Attenuations are added up: 0 is air, about 1 bone.
"""

import cv2
import numpy as np

from cxrfast.phantoms import anatomy as body
from cxrfast.phantoms import planting
from cxrfast.phantoms.anatomy import Anatomy
from cxrfast.phantoms.cohort import Image, stream
from cxrfast.phantoms.findings import FINDINGS
from cxrfast.phantoms.geometry import Frame, Points, disc, mirror, smooth
from cxrfast.phantoms.planting import Placement


def draw(image: Image, seed: int) -> np.ndarray:
    """The radiograph of `image`: uint8 (height, width), 0 for air.

    All random numbers are drawn whether or not a finding is present, so that everything else stays equal.
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
        grey += fine(native, [planting.pleural_line(anatomy, placement, image.view)], 42)
    if "Fracture" in image.present:
        grey += fine(native, planting.hairlines(anatomy, placement, image.view), -60)
    return np.clip(np.rint(grey), 0, 255).astype(np.uint8)


def expose(attenuation: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Attenuation → grey levels, float32: uneven tissue, exposure, a film's shoulder for dense parts."""
    h, w = attenuation.shape
    for cells, strength in ((5, 0.030), (24, 0.014), (90, 0.010)):
        noise = rng.standard_normal((cells, cells), np.float32) * np.float32(strength)
        uneven = cv2.resize(noise, (w, h), interpolation=cv2.INTER_CUBIC)
        attenuation = attenuation + uneven * (attenuation > 0.1)  # air stays even
    gain, gamma, offset = rng.uniform(0.93, 1.07), rng.uniform(1.5, 1.75), rng.uniform(0, 10)
    film = np.maximum(attenuation, 0) ** np.float32(gamma) * np.float32(2.6 * gain)
    return (np.float32(offset) + 244 * (1 - np.exp(-film))).astype(np.float32)


def fine(frame: Frame, lines: list[np.ndarray], levels: float) -> np.ndarray:
    """Grey levels that lines of one to two pixels add to an image. float32.

    The surroundings are darkened by as much as the lines are brightened (or the reverse), as in digital
    radiography's edge enhancement: the mean of any larger square stays, so reduced images show no trace.
    """
    mask = np.zeros((frame.height, frame.width), np.uint8)
    for line in lines:
        cv2.polylines(mask, [frame.pixels(line)], False, 255, 1, cv2.LINE_AA, 4)
    line_only = mask.astype(np.float32)
    return (line_only - cv2.blur(line_only, (7, 7), borderType=cv2.BORDER_REFLECT)) * np.float32(levels / 255)


def frontal(frame: Frame, a: Anatomy, p: Placement, present: tuple[str, ...], ap: bool) -> np.ndarray:
    """Attenuation of a PA or AP view without fine findings, float32 (H, W)."""
    lungs = frame.areas([body.lung(a, -1), body.lung(a, 1)], 1.3)
    ratio = a.heart[1 if "Cardiomegaly" in present else 0]
    centre = frame.areas(body.heart(a, ratio), 1.6)
    tissue = frame.areas(body.trunk(a), 2.5)
    depth = tissue * (0.34 + 0.30 * frame.blur((tissue * 255).astype(np.uint8), 22))
    image = depth + (0.03 * a.fat) * tissue
    tree = draw_vessels(frame, body.vascular_tree(a, [(-34, -12, -1), (34, -20, 1)]))
    hila = frame.areas([disc(-36, -8, 13, 24), disc(37, -18, 12, 22)], 6)
    air = lungs * (1 - 0.93 * centre)
    wet = [mirror(planting.fluid_outline(a, p, s, (18, a.half + 2)), s) for s in planting.effusions(p, present)]
    fluid = frame.areas(wet, 2.2)
    air *= 1 - fluid
    image -= air * (0.415 - 0.125 * tree - 0.09 * hila)
    image += 0.05 * centre + 0.08 * np.maximum(frame.areas([body.lower_body(a)], 6), fluid)
    if "Lung Opacity" in present:
        image += 0.26 * frame.areas([planting.patch_outline(a, p, "AP")], 6) * air
    if "Lung Lesion" in present:
        image += 0.20 * frame.areas([planting.nodule_outline(a, p, "AP")], 0.8)
    image += bones(frame, a, ap)
    airways = [[(0, -230), (1, -120), (3, -58)], [(3, -58), (-26, -32)], [(3, -58), (32, -38)]]
    image -= 0.10 * frame.bands(airways, 15, 2.0) * tissue
    image -= 0.30 * frame.areas([disc(60, a.dome[1] + a.bubble + 12, 1.7 * a.bubble, a.bubble)], 2)
    if "Support Devices" in present:
        image += devices(frame, p.device, a)
    return image


def bones(frame: Frame, a: Anatomy, ap: bool) -> np.ndarray:
    """Ribs, clavicles, spine, shoulder blades and upper arms. An AP view shows the blades over the lungs."""
    pairs = [body.ribs(a, side) for side in (-1, 1)]
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


def lateral(frame: Frame, a: Anatomy, p: Placement, present: tuple[str, ...]) -> np.ndarray:
    """Attenuation of a lateral view without fine findings, float32 (H, W). The patient faces left."""
    base = a.dome[0]
    lungs = frame.areas([body.lateral_lungs(a)], 1.5)
    ratio = a.heart[1 if "Cardiomegaly" in present else 0]
    rx = 0.31 * 2 * a.half * ratio
    vessels = smooth([(-20, -60), (5, -75), (22, -60), (24, 10), (5, 20), (-30, 0)])
    centre = frame.areas([disc(-88 + rx, base - 0.95 * rx + 6, rx, 1.12 * rx), vessels], 3)
    tissue = frame.areas([body.lateral_body(a)], 2.5)
    image = tissue * (0.36 + 0.28 * frame.blur((tissue * 255).astype(np.uint8), 22))
    air = lungs * (1 - 0.75 * centre)
    wet = [planting.fluid_outline(a, p, side, (-98, 104)) for side in planting.effusions(p, present)]
    fluid = frame.areas(wet, 2.2)
    air *= 1 - fluid
    image -= air * (0.37 - 0.11 * draw_vessels(frame, body.vascular_tree(a, [(2, -22, 0)])))
    belly = [(-130, base + 8), (70, base + 14), (130, a.angle), (130, 260), (-130, 260)]
    image += 0.08 * np.maximum(frame.areas([belly], 7), fluid) * tissue
    if "Lung Opacity" in present:
        image += 0.24 * frame.areas([planting.patch_outline(a, p, "LATERAL")], 6) * air
    if "Lung Lesion" in present:
        image += 0.20 * frame.areas([planting.nodule_outline(a, p, "LATERAL")], 0.8)
    spine = [
        [(x - 7, y), (x + 7, y + 1)] for y in np.arange(-210, 240, a.rib_step) for x in [84 - 0.0013 * (y - 20) ** 2]
    ]
    image += 0.09 * frame.bands(spine, 0.78 * a.rib_step, 1.0, core=0.7)
    image += 0.07 * frame.bands(body.lateral_ribs(a), 8.5, 0.9, core=0.6)
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


def draw_vessels(frame: Frame, tree: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    mask = np.zeros((frame.height, frame.width), np.uint8)
    ends = frame.pixels(tree[0].reshape(-1, 2)).reshape(-1, 2, 1, 2)
    thick = np.ceil(tree[1] * 1.5).astype(int)  # classes of 2/3 mm, drawn wide over thin
    for k in np.unique(thick):
        grey, width = min(255, 60 + 25 * int(k)), max(1, round(k / 1.5 * frame.scale))
        cv2.polylines(mask, list(ends[thick == k]), False, grey, width, cv2.LINE_AA, 4)
    return frame.blur(mask, 0.7)
