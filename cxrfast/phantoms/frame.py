"""From mm to pixels: outlines and lines come in, soft masks in 0..1 go out."""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from cxrfast.phantoms.curves import Points

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
