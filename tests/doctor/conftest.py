from collections.abc import Iterator
from pathlib import Path

import pytest

from cxrfast.pipelines.reader import Reader


@pytest.fixture
def reader(tiny_set: Path) -> Iterator[Reader]:
    with Reader(tiny_set, 64) as reader:
        yield reader
