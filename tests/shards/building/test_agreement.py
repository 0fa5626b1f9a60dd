import itertools

import numpy as np
import pytest

from cxrfast.shards.building.agreement import allowed
from cxrfast.shards.format.info import read_set
from cxrfast.shards.images.cell_means import STEPS, grid
from cxrfast.shards.images.resize import at_scales


@pytest.mark.parametrize("resize", ["squash", "pad"])
def test_one_image_at_two_scales_never_differs_by_more_than_is_allowed(resize, tiny_set):
    """Noise, black and white noise, and an edge, in sizes that no scale divides."""
    info = read_set(tiny_set)
    object.__setattr__(info, "resize", resize)
    rng = np.random.default_rng(0)
    scales = [8, 9, 10, 13, 16, 21, 32, 50, 64, 100, 224, 256]
    for height, width in ((64, 64), (101, 77), (37, 301), (13, 17)):
        noise = rng.integers(0, 256, (height, width)).astype(np.uint8)
        edge = np.zeros_like(noise)
        edge[:, width // 2 + 1 :] = 255
        for image in (noise, np.where(noise > 127, 255, 0).astype(np.uint8), edge):
            grids = {scale: grid(picture) / STEPS for scale, picture in at_scales(image, scales, resize).items()}
            for one, other in itertools.combinations(scales, 2):
                assert np.abs(grids[one] - grids[other]).max() <= allowed(one, other, info), (one, other)
