import torch
import torchvision
from torch import nn

from cxrfast.bench.training.memory import saved_bytes
from cxrfast.models.densenet import lean


def test_it_keeps_less_for_the_backward_pass_and_with_checkpointing_far_less() -> None:
    with torch.device("meta"):
        theirs = saved_bytes(torchvision.models.densenet121(), 256, channels=3)
        plain, checkpointed = (saved_bytes(lean(torchvision.models.densenet121(), c), 256, 3) for c in (False, True))
    assert plain < theirs
    assert checkpointed < 0.6 * theirs


def test_saved_bytes_are_those_of_a_network_that_can_be_counted_by_hand() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 1))
    assert saved_bytes(net, 8) == 8 * 8 * (1 + 4) * 4, "the image and the map behind the ReLU, kept once, float32"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert saved_bytes(net, 8) == 8 * 8 * (1 + 4) * 2
