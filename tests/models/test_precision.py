"""Number formats and compilation."""

from pathlib import Path

import pytest
import torch
from commands import invoke
from torch import nn
from torchvision.models import DenseNet
from trainings import CUDA, make_trainer, needs_gpu

from cxrfast.config import COMPILE_MODES, Runtime
from cxrfast.errors import RunError
from cxrfast.models.networks.densenet import lean
from cxrfast.models.precision import compiled, inference_precision, resolve_precision, use_tf32, without_tf32


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_modes_that_capture_cuda_graphs_are_refused_with_the_reason(tiny_set, tmp_path, mode):
    given = ["train", f"--shards={tiny_set}", f"--runs={tmp_path}", "--device=cpu", "--scale=32", f"--compile={mode}"]
    done = invoke(*given)
    assert done.exit_code == 2
    assert f"--compile {mode} captures CUDA graphs, which fail when gradients are accumulated" in done.output
    assert "use default or max-autotune-no-cudagraphs" in done.output
    assert not (tmp_path / "densenet121-32").exists()


def test_an_unknown_mode_and_tf32_on_a_cpu_are_refused():
    with pytest.raises(RunError, match="--compile fast is unknown: use default or max-autotune-no-cudagraphs"):
        Runtime(shards=Path(), runs=Path(), compile="fast")
    with pytest.raises(RunError, match="--precision tf32 works on NVIDIA GPUs only"):
        resolve_precision("tf32", torch.device("cpu"))
    assert resolve_precision("tf32", CUDA) == "tf32"


def test_a_network_that_was_trained_in_tf32_answers_in_fp32_on_a_cpu():
    assert inference_precision("tf32", torch.device("cpu")) == "fp32"
    assert inference_precision("tf32", CUDA) == "tf32"
    assert inference_precision("bf16", torch.device("cpu")) == "bf16"


@needs_gpu
@pytest.mark.parametrize("mode", COMPILE_MODES)
def test_a_compiled_network_accumulates_the_gradients_of_an_eager_one(mode):
    """Two micro-batches before the gradients are looked at, as every preset has it."""
    torch.manual_seed(0)
    use_tf32("fp32")
    eager = lean(DenseNet(8, (2, 2), 16, num_classes=5)).to(CUDA, memory_format=torch.channels_last)
    other = lean(DenseNet(8, (2, 2), 16, num_classes=5)).to(CUDA, memory_format=torch.channels_last)
    other.load_state_dict(eager.state_dict())
    forward = compiled(other, mode)
    for images in torch.randn(2, 4, 3, 64, 64, device=CUDA):
        for net in (eager, forward):
            net(images.contiguous(memory_format=torch.channels_last)).square().sum().backward()
    for (name, p), q in zip(eager.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-4, msg=name)


@pytest.fixture
def _tf32_as_before():
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def tf32() -> tuple[bool, bool]:
    """May convolutions, and matrix products, use it?"""
    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


@pytest.mark.usefixtures("_tf32_as_before")
def test_only_the_precision_tf32_computes_in_tf32_unless_float32_is_asked_for_a_while(tiny_set, tmp_path):
    for precision, expected in (("fp32", (False, False)), ("bf16", (False, False)), ("tf32", (True, True))):
        use_tf32(precision)
        assert tf32() == expected
    with without_tf32():
        assert tf32() == (False, False)
    assert tf32() == (True, True), "all is as it was"
    make_trainer(tiny_set, tmp_path, precision="fp32")
    assert tf32() == (False, False)


@needs_gpu
@pytest.mark.usefixtures("_tf32_as_before")
def test_float32_convolutions_of_a_gpu_are_those_of_a_cpu_and_tf32_is_coarser():
    torch.manual_seed(0)
    convolution, images = nn.Conv2d(64, 64, 3), torch.randn(8, 64, 32, 32)
    expected = convolution(images)
    errors = {}
    for precision in ("fp32", "tf32"):
        use_tf32(precision)
        errors[precision] = (convolution.to(CUDA)(images.to(CUDA)).cpu() - expected).abs().max().item()
    assert errors["fp32"] < 1e-5 < errors["tf32"] < 1e-1
