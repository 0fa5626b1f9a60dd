"""Gradients that are off, on the device or when compiled, are refused."""

import pytest
import torch
from batches import CPU
from torch import nn

from cxrfast.doctor import gradients as gradients_module
from cxrfast.doctor.checkup import checks
from cxrfast.doctor.gradients import compiled_step, gradients, no_compiler
from cxrfast.errors import RunError
from cxrfast.models.classifier import Classifier


def test_float32_and_bf16_gradients_pass_here(reader) -> None:
    assert gradients(reader, CPU).startswith("fp32: loss off by")


@pytest.mark.parametrize("what", ["gradient", "loss"])
def test_a_model_whose_gradient_or_loss_is_off_is_refused(reader, monkeypatch, what) -> None:
    class OffClassifier(Classifier):
        """Off by 1 % where it recomputes activations, which only the device's model does here."""

        def forward(self, image):
            logits = super().forward(image)
            if not self.net.features.recompute:
                return logits
            if what == "loss":
                return 1.01 * logits
            if logits.requires_grad:
                logits.register_hook(lambda gradient: 1.01 * gradient)
            return logits

    monkeypatch.setattr(gradients_module, "Classifier", OffClassifier)
    with pytest.raises(RunError, match=r"fp32: loss off by .* computes wrongly on cpu"):
        gradients(reader, CPU)


class Off(nn.Module):
    """A compiled module whose output is 1 % off."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return 1.01 * self.module(image)


class Forgetful(Off):
    """A compiled module that forgets the first micro-batch's gradient."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        self.module.zero_grad()
        return self.module(image)


@pytest.mark.parametrize(("module", "message"), [(Off, "when compiled"), (Forgetful, "loss off by 0e")])
def test_a_compiled_step_that_differs_is_refused(monkeypatch, module, message) -> None:
    monkeypatch.setattr(gradients_module, "compiled", lambda eager, mode: module(eager))
    with pytest.raises(RunError, match=message):
        compiled_step(CPU)


def test_without_a_compiler_compilation_is_left_out(monkeypatch, reader) -> None:
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "")
    assert "no C++ compiler" in no_compiler()
    skipped = {check.name: check.skipped for check in checks(reader, CPU)}
    assert "no C++ compiler" in skipped["compiled step"]
