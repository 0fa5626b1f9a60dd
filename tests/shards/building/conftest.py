import subprocess

import numpy as np
import pytest
from sets import build

from cxrfast.shards.images.decode import encode


@pytest.fixture(scope="module")
def noisy(tmp_path_factory, phantoms):
    """The phantoms' tree with noise of 640 px for images: slow enough for something to happen in between."""
    tree = tmp_path_factory.mktemp("noisy") / "mimic"
    subprocess.run(["cp", "-r", phantoms, tree], check=True)
    rng = np.random.default_rng(0)
    for path in sorted(tree.rglob("*.jpg")):
        path.write_bytes(encode(rng.integers(0, 256, (640, 640), np.uint8), 95))
    return tree


@pytest.fixture(scope="module")
def noisy_set(noisy, tmp_path_factory):
    out = tmp_path_factory.mktemp("noisy-set") / "set"
    build(noisy, out, [256, 512], workers=2)
    return out
