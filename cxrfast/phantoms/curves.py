"""Curves in mm: smoothed, mirrored, round. Pure."""

from collections.abc import Sequence

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
