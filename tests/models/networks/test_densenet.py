"""Our DenseNet is torchvision's: same names, weights, logits, gradients and statistics; only what it keeps differs."""

import copy
from collections import Counter
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile
from torchvision.models import DenseNet, densenet121, get_model

from cxrfast.models.networks.densenet import ARCHITECTURES, lean

ODD = 7
"""Images in a batch: no weight has so many output channels, so that a 4-d tensor of 7 is an activation or its gradient."""

SMALL = partial(DenseNet, 8, (2, 3, 2), 16, num_classes=3)
"""torchvision's, with three blocks of two or three layers."""


def small(recompute: bool = False) -> DenseNet:
    """With the same weights each time."""
    torch.manual_seed(0)
    return lean(SMALL(), recompute)


def images(n: int = 2, side: int = 64, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    drawn = torch.randn((n, 3, side, side), generator=torch.Generator().manual_seed(1), dtype=dtype)
    return drawn.contiguous(memory_format=torch.channels_last)


def step(net: nn.Module, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits of one training step, gradients of the image and of all parameters, running statistics afterwards."""
    pixels = pixels.clone(memory_format=torch.preserve_format).requires_grad_()
    logits = net(pixels)
    logits.float().square().sum().backward()
    gradients = {name: p.grad for name, p in net.named_parameters()}
    found = {"logits": logits.detach(), "image": pixels.grad, **gradients, **dict(net.named_buffers())}
    return {name: tensor.clone() for name, tensor in found.items() if tensor is not None}


def outputs(net: nn.Module) -> dict[str, torch.Tensor]:
    """Fills with the outputs of convolutions, blocks and the whole in their first pass, by name."""
    found: dict[str, torch.Tensor] = {}

    def keep(name: str, module: nn.Module, inputs: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        whole = torch.cat(output, 1) if isinstance(output, tuple) else output
        found.setdefault(name, whole.detach().clone())

    for name, module in net.named_modules():
        last = name.rsplit(".", 1)[-1]
        inside = "transition" in name and "." in name.removeprefix("features.")  # averaged before, not after
        if last.startswith(("conv", "dense", "transition", "features", "classifier")) and not inside:
            module.register_forward_hook(partial(keep, name))
    return found


close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
assert_same = partial(torch.testing.assert_close, rtol=0, atol=0)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("large", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_it_equals_torchvisions_layer_by_layer_forwards_and_backwards(large, recompute):
    torch.manual_seed(3)
    oracle = (densenet121(num_classes=3) if large else SMALL()).double()
    ours = lean(copy.deepcopy(oracle), recompute)
    pixels = images(dtype=torch.float64)
    theirs_layers, our_layers = outputs(oracle), outputs(ours)
    theirs, mine = step(oracle, pixels), step(ours, pixels)
    layers, transitions = (58, 3) if large else (7, 2)
    assert len(theirs_layers) == 3 + 3 * layers + (transitions + 1) + transitions
    assert len(mine) == 2 + len(list(oracle.parameters())) + len(list(oracle.buffers()))
    close(our_layers, theirs_layers)
    close(mine, theirs)
    with torch.no_grad():
        close(ours.eval()(pixels), oracle.eval()(pixels))


@pytest.mark.parametrize(
    "arch", [ARCHITECTURES[0], *(pytest.param(a, marks=pytest.mark.slow) for a in ARCHITECTURES[1:])]
)
def test_names_shapes_and_their_order_are_torchvisions(arch):
    with torch.device("meta"):
        ours, oracle = lean(get_model(arch, num_classes=5)), get_model(arch, num_classes=5)
    assert [(k, v.shape) for k, v in ours.state_dict().items()] == [
        (k, v.shape) for k, v in oracle.state_dict().items()
    ]
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in oracle.named_parameters()], "order, for optimisers"


def test_a_seed_gives_torchvisions_first_weights_and_its_state_goes_there_and_back():
    ours = small()
    torch.manual_seed(0)
    oracle = SMALL()
    assert_same(dict(ours.state_dict()), dict(oracle.state_dict()))
    with torch.no_grad():
        ours.features.conv0.weight.add_(1)
    oracle.load_state_dict(ours.state_dict())
    assert torch.equal(oracle.features.conv0.weight, ours.features.conv0.weight)


# Checkpointing


@pytest.mark.parametrize(("precision", "training"), [("fp32", True), ("fp32", False), ("bf16", True)])
def test_checkpointing_changes_no_logit_gradient_or_statistic(precision, training):
    def one(recompute: bool) -> dict[str, torch.Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16) if precision == "bf16" else nullcontext():
            return step(small(recompute).train(training), images())

    assert_same(one(True), one(False))


def test_statistics_move_once_however_often_a_graph_is_walked():
    net = small(recompute=True)
    loss = net(images()).sum()
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    loss.backward(retain_graph=True)
    first = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    net.zero_grad()
    loss.backward()
    assert all(torch.equal(buffer, before[name]) for name, buffer in net.named_buffers())
    assert {int(b) for name, b in net.named_buffers() if name.endswith("tracked")} == {1}
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), first, strict=True) if p.grad is not None)


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_nothing_is_computed_again_where_no_gradient_is_recorded(without):
    net, counted = small(recompute=True), Counter()
    for name, module in net.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda *_, name=name: counted.update([name]))
    with without():
        net(images())
    assert set(counted.values()) == {1}
    net(images()).sum().backward()
    assert counted.pop("features.norm5") == 2
    assert set(counted.values()) == {3}, "all but the last norm are computed again"


KERNELS = ("aten::mkldnn_convolution", "aten::_slow_conv2d_forward")
"""What computes a convolution on a CPU; which of them, size, threads and torch's version decide."""


def test_no_convolution_runs_twice():
    def convolutions(net: DenseNet) -> int:
        with profile(activities=[ProfilerActivity.CPU]) as found:
            net(images()).sum().backward()
        return sum(event.name in KERNELS for event in found.events())

    assert convolutions(small(recompute=True)) == convolutions(small()) == 1 + 2 * 7 + 2


def test_a_mode_changed_between_the_two_passes_is_an_error_not_another_gradient():
    net = small(recompute=True)
    loss = net(images()).sum()
    net.eval()
    with pytest.raises(RuntimeError, match="between a forward pass and its backward pass"):
        loss.backward()


# Company


def test_a_copy_is_independent_and_equal():
    net = small(recompute=True)
    assert_same(step(copy.deepcopy(net), images()), step(net, images()))


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_it_can_be_compiled(recompute):
    eager, compiled = step(small(recompute), images()), small(recompute)
    logits = torch.compile(compiled, backend="aot_eager", fullgraph=True)(images())
    logits.square().sum().backward()
    torch.testing.assert_close(logits.detach(), eager["logits"])
    for name, tensor in [(n, p.grad) for n, p in compiled.named_parameters()] + list(compiled.named_buffers()):
        torch.testing.assert_close(tensor, eager[name], rtol=1e-4, atol=1e-5)


def test_it_trains_under_distributed_data_parallel(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        last = {"memory_format": torch.channels_last}
        alone = step(small().to(**last), images())
        wrapped = DistributedDataParallel(small(recompute=True).to(**last))
        together = step(wrapped, images())
        del wrapped
    finally:
        dist.destroy_process_group()
    assert_same({name.removeprefix("module."): value for name, value in together.items()}, alone)


# Layout


def copied(net: nn.Module, pixels: torch.Tensor) -> list[list[int]]:
    """Shapes of the activations and gradients that a training step copies: to another layout, type or place."""
    pixels = pixels.requires_grad_()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
        net(pixels).square().sum().backward()
    shapes = [event.input_shapes[0] for event in found.events() if event.name == "aten::copy_"]
    return [shape for shape in shapes if len(shape) == 4 and shape[0] == ODD]


@pytest.mark.slow
def test_a_channels_last_step_of_densenet121_copies_no_activation():
    net = lean(densenet121(num_classes=14)).to(memory_format=torch.channels_last)
    # a block's last layer alone has one reader: its gradient is cut out of that of the concatenation, not summed
    last = [[ODD, 32, side, side] for side in (2, 4, 8, 16)]
    assert copied(net, images(ODD)) == last


@pytest.mark.parametrize("recompute", [False, True])
def test_nchw_pixels_would_be_seen_as_copies_and_recomputation_makes_none(recompute):
    net = small(recompute).to(memory_format=torch.channels_last)
    last = [[ODD, 8, side, side] for side in (4, 8, 16)]
    assert copied(net, images(ODD)) == last
    assert [ODD, 3, 64, 64] in copied(net, images(ODD).contiguous())
