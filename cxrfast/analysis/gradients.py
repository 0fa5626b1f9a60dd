"""What every gradient with respect to pixels or feature maps needs: a model that stays as it was, and batches that fit."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from torch import nn

from cxrfast.pipelines.order import EvalOrder

BATCH_PIXELS = 2**18
"""In a batch, at most, unless one image has more: a backward pass through DenseNet121 holds 3 kB a pixel."""


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients of the weights, which saves memory; afterwards all is as it was."""
    modes = [(module, module.training) for module in model.modules()]
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for p, grad in wanted:
            p.requires_grad_(grad)


def small_batches(rows: np.ndarray, scale: int) -> EvalOrder:
    """`rows` in their order, in batches that a backward pass can afford."""
    return EvalOrder(rows=rows, micro_batch=max(1, BATCH_PIXELS // scale**2))
