"""Curves in mm, smoothed, mirrored or round, and the frame that turns them into soft masks of pixels, 0..1. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

Points = Sequence[tuple[float, float]] | np.ndarray
"""(N, 2) of x and y in mm."""


def smooth(points: Points, closed: bool = True, steps: int = 8) -> np.ndarray:
    """Catmull-Rom curve through the points: (M, 2), `steps` points per given one."""
    p = np.asarray(points, float)
    p = np.vstack([p[-1:], p, p[:2]]) if closed else np.vstack([2 * p[:1] - p[1:2], p, 2 * p[-1:] - p[-2:-1]])
    a, b, c, d = p[:-3], p[1:-2], p[2:-1], p[3:]
    t = np.linspace(0, 1, steps, endpoint=False)[:, None, None]
    curve = b + 0.5 * t * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)))
    curve = curve.transpose(1, 0, 2).reshape(-1, 2)
    return curve if closed else np.vstack([curve, p[-2:-1]])


def mirror(points: Points, side: float) -> np.ndarray:
    """`points`, on the other side of the body if `side` is -1."""
    return np.asarray(points, float) * (side, 1.0)


def disc(x: float, y: float, rx: float, ry: float) -> np.ndarray:
    turn = np.linspace(0, 2 * np.pi, 32, endpoint=False)
    return np.stack([x + rx * np.cos(turn), y + ry * np.sin(turn)], axis=1)


FIELD = 430.0
"""mm over the longer side of an image."""


@dataclass(frozen=True)
class Frame:
    """A grid of pixels over the patient, who is `shift` mm off its centre, rotated by `angle` radians."""

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
        """Mask of filled outlines."""
        mask = np.zeros((self.height, self.width), np.uint8)
        for outline in outlines:
            cv2.fillPoly(mask, [self.pixels(outline)], 255, cv2.LINE_AA, 4)
        return self.blur(mask, blur)

    def bands(self, lines: Sequence[Points], width: float, blur: float, core: float = 1.0) -> np.ndarray:
        """Lines of `width` mm, with the value `core` inside their walls, like a bone with its cortex."""
        mask = np.zeros((self.height, self.width), np.uint8)
        for share, value in ((1.0, 255), (0.62, round(255 * core)))[: 1 if core == 1.0 else 2]:
            for line in lines:
                thick = max(1, round(width * share * self.scale))
                cv2.polylines(mask, [self.pixels(line)], False, value, thick, cv2.LINE_AA, 4)
        return self.blur(mask, blur)
