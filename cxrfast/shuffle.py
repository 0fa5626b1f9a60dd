"""Random order that is the same on every machine and with every version of numpy."""

import numpy as np


def permutation(n: int, *key: int) -> np.ndarray:
    """A permutation of 0…n-1, int64, that depends only on `key` (one or two whole numbers).

    The argsort of raw Philox words: numpy keeps bit streams across versions, but not its Generator's methods (NEP 19).
    """
    words = np.random.Philox(key=np.array((*key, 0)[:2], np.uint64)).random_raw(n)
    return np.argsort(words)
