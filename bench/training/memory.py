"""Memory of a training step: the bytes that autograd keeps for a model's backward pass."""

import copy

import torch
from torch import nn


def saved_bytes(model: nn.Module, size: int, channels: int = 1) -> int:
    """Bytes autograd keeps between forward and backward per image, float32 (channels, size, size).

    Measured in training mode on the model's device, as a batch of three less a batch of two, which leaves out what does
    not grow with the batch. Each storage counts once and whole; parameters and buffers do not count, the images do.
    A model on the `meta` device is measured without computing or allocating anything. Call it within `torch.autocast`
    for another precision. What lives only during the two passes (gradients, a layer's recomputation) does not count.
    """
    trial = copy.deepcopy(model).train()  # a copy, since a forward pass moves BatchNorm's statistics
    device = next(trial.parameters()).device
    own = {tensor.untyped_storage()._cdata for tensor in (*trial.parameters(), *trial.buffers())}

    def kept(batch: int) -> int:
        storages: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                storages[storage._cdata] = storage  # held, so that no address is used twice
            return tensor

        image = torch.zeros((batch, channels, size, size), device=device)
        image = image.contiguous(memory_format=torch.channels_last)
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            trial(image)
        return sum(storage.nbytes() for storage in storages.values())

    return kept(3) - kept(2)  # one image of 32 px ends as a single pixel, which has no variance for BatchNorm
