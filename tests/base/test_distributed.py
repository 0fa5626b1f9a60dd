"""Ranks and devices: what a process gets, and how ranks agree."""

import pytest
import torch
from trainings import run_ranks

from cxrfast.distributed import pick_device, world
from cxrfast.errors import DeviceError


def test_a_number_of_threads_that_the_user_set_stays(monkeypatch):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        monkeypatch.setattr("cxrfast.distributed.usable_cores", lambda: 2)
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        with world("cpu"):
            assert torch.get_num_threads() == 1
        monkeypatch.delenv("OMP_NUM_THREADS")
        with world("cpu"):
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_one_process_is_a_world_of_one_rank():
    with world("cpu") as ranks:
        assert (ranks.rank, ranks.size, ranks.is_first, ranks.device.type) == (0, 1, True, "cpu")
        assert (ranks.gather("x"), ranks.broadcast("x"), ranks.on_first(lambda: 5)) == (["x"], "x", 5)


@pytest.mark.parametrize("name", ["gpu", "cuda:x"])
def test_an_unknown_device_is_refused(name):
    with pytest.raises(DeviceError, match=f"--device {name} is unknown"):
        pick_device(name)


RANKS = """
import sys
from pathlib import Path
import torch
from cxrfast.distributed import world
from trainings import make_trainer

shards, folder = map(Path, sys.argv[1:])
with world("cpu") as ranks:
    trainer = make_trainer(shards, folder / str(ranks.rank), ranks=ranks)
    trainer.train_epoch()
    images = torch.stack([b.image[0] for b, _ in zip(trainer.val_loader.epoch(), range(1))]).expand(4, -1, -1, -1)
    images = ranks.broadcast(images)

    def scores():
        trainer.model.eval()
        with torch.inference_mode():
            return trainer.model(images)

    before = ranks.gather(scores())
    ranks.broadcast_buffers(trainer.model)
    after = ranks.gather(scores())
    if ranks.is_first:
        print(float((before[0] - before[1]).abs().max()), float((after[0] - after[1]).abs().max()))
    del trainer
"""


@pytest.mark.slow
def test_all_ranks_score_the_same_images_alike(tiny_set, tmp_path):
    before, after = map(float, run_ranks(RANKS, 2, tiny_set, tmp_path).split())
    assert before > 1e-4, "each rank keeps statistics of its own while training, or this test shows nothing"
    assert after == 0.0


STRIDES = """
import warnings
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from cxrfast.distributed import parallel

class Restride(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight):
        return weight.clone()

    @staticmethod
    def backward(ctx, gradient):  # as channels last leaves that of a 1 x 1 convolution on a GPU
        n = gradient.shape[1]
        return gradient.contiguous().as_strided(gradient.shape, (n, 1, n, n))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 4, 1, 1))

    def forward(self, images):
        return nn.functional.conv2d(images, Restride.apply(self.weight))

dist.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
with warnings.catch_warnings(record=True) as found:
    warnings.simplefilter("always")
    net = PARALLEL
    net(torch.randn(2, 4, 5, 5)).sum().backward()
print(sum("Grad strides" in str(warning.message) for warning in found))
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("net", "warnings"),
    [("parallel(Net())", "0"), ("DistributedDataParallel(Net(), gradient_as_bucket_view=True)", "1")],
)
def test_ranks_do_not_warn_of_the_strides_of_gradients_which_torch_alone_does(tmp_path, net, warnings):
    assert run_ranks(STRIDES.replace("PARALLEL", net), 1, tmp_path).strip() == warnings
