import numpy as np
import pytest
import torch
from batches import CPU, assert_agree, decoded, engine, turned
from torchvision.transforms.functional import resize

from cxrfast.pipelines.dali import DaliEngine, available
from cxrfast.pipelines.host import HostEngine
from cxrfast.pipelines.order import Work
from cxrfast.pipelines.reader import Reader

pytestmark = pytest.mark.skipif(not available(), reason="NVIDIA DALI is not installed")


def test_dali_decodes_every_batch_itself_where_nothing_is_damaged(reader, monkeypatch):
    monkeypatch.setattr(HostEngine, "batches", None)  # must not be asked
    dali = DaliEngine(reader, 64, CPU, 2)
    assert len(list(dali.batches(turned(reader.rows, 16)))) == 10
    assert list(dali.batches([])) == []


@pytest.mark.parametrize("size", [32, 48, 100])
def test_another_size_is_within_three_levels_of_torchvision(reader, size):
    (batch,) = engine("dali", reader, size).batches([Work(np.arange(40))])
    assert batch.shape == (40, 1, size, size)
    images = torch.tensor(np.array([decoded(reader, row) for row in range(40)]))[:, None].float()
    difference = (batch - resize(images, [size, size], antialias=True)).abs()
    assert difference[..., 2:-2, 2:-2].max() <= 3, "at the very edge DALI repeats pixels"


def test_a_batch_that_dali_refuses_and_the_host_decodes_changes_nothing(reader):
    class Faltering(Reader):
        """Returns nonsense for some rows once."""

        falters = {12, 75, 149}  # noqa: RUF012

        def read(self, row, buffer=None):
            if row in self.falters:
                self.falters.discard(row)
                return memoryview(b"\xff\xd8 no picture")
            return super().read(row, buffer)

    work = turned(reader.rows, 10)
    with Faltering(reader.folder, 64) as reader:
        got = list(engine("dali", reader).batches(work))
    assert Faltering.falters == set()
    assert_agree(got, engine("host", reader).batches(work))
