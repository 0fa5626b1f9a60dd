"""Passes work through while a helper thread asks the system to read the images of later work.

On a cold disk or a network file system the decoding threads alone would request too few images at a time.
"""

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from cxrfast.pipelines.decoder import Pixels
from cxrfast.pipelines.order import Work

AHEAD_BYTES = 64 * 2**20
"""Encoded bytes to read ahead, about. They are requested in two halves, so that rows close to each other in a tar, as in a
block order, are read in one piece."""


def read_ahead(pixels: Pixels, work: Iterable[Work]) -> Generator[Work]:
    """Yield `work` in order and unchanged."""
    waiting: deque[tuple[Work, int]] = deque()
    group: list[np.ndarray] = []
    held = asked = 0
    helper = ThreadPoolExecutor(1, thread_name_prefix="cxrfast-readahead")
    try:
        for item in work:
            size = pixels.reader.bytes_of(item.rows)
            waiting.append((item, size))
            group.append(item.rows)
            held, asked = held + size, asked + size
            if asked > AHEAD_BYTES // 2:
                helper.submit(pixels.advise, np.concatenate(group))
                group, asked = [], 0
            while held > AHEAD_BYTES:
                first, size = waiting.popleft()
                held -= size
                yield first
        if group:
            helper.submit(pixels.advise, np.concatenate(group))
        while waiting:
            yield waiting.popleft()[0]
    finally:
        helper.shutdown(wait=True, cancel_futures=True)
