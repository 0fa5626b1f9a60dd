import pytest

from cxrfast.pipelines.reader import Reader


@pytest.fixture
def reader(tiny_set):
    with Reader(tiny_set, 64) as reader:
        yield reader
