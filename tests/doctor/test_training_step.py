"""Synchronisations are counted on steps of a training, and what does not fit the memory is named."""

import warnings

import pytest
import torch
from batches import CPU

from cxrfast.doctor import training_step
from cxrfast.doctor.training_step import STEPS, WARM_UP, memory, new_trainer, waiting_in
from cxrfast.errors import RunError
from cxrfast.pipelines.reader import Reader
from cxrfast.shards.build import build
from cxrfast.training import micro_batch


def test_the_steps_whose_synchronisations_are_counted_are_those_of_a_training(reader):
    with new_trainer(reader, CPU) as trainer:
        before = [p.detach().clone() for p in trainer.model.parameters()]
        batches = trainer.train_loader.epoch(0)
        for rows in trainer.order.global_batches(0)[: WARM_UP + STEPS]:
            trainer.step(rows, batches)
        batches.close()
        assert 0.1 < float(trainer.loss.total) / 4 < 2
        assert not any(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    assert not trainer.run.folder.exists()


def test_a_set_of_too_few_rows_for_the_steps_says_so(reader, monkeypatch):
    monkeypatch.setattr(training_step, "MOST", 8)
    with pytest.raises(RunError, match="8 images are too few"), new_trainer(reader, CPU):
        pass


def test_synchronisations_are_counted_and_other_warnings_are_not(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)  # needs a GPU

    def step() -> None:
        warnings.warn("called a synchronizing CUDA operation\n(Triggered internally)", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    assert waiting_in(step, 2) == ["called a synchronizing CUDA operation"] * 2
    assert modes == ["warn", "default"]


@pytest.mark.slow
def test_the_presets_micro_batch_fits_and_its_memory_is_told(reader):
    assert "densenet121, 16 × 64 px" in memory(reader, CPU)


def test_a_micro_batch_that_does_not_fit_names_what_helps(reader, monkeypatch):
    for module in (training_step, micro_batch):
        monkeypatch.setattr(module, "memory_bytes", lambda: 600 * 2**20)
    with pytest.raises(RunError, match=r"does not fit 0.6 GiB: .*--micro-batch.*--recompute"):
        memory(reader, CPU)


def test_images_that_are_too_small_to_train_on_are_named(phantoms, tmp_path):
    build(phantoms, tmp_path / "set", [8], workers=1)
    with Reader(tmp_path / "set", 8) as reader, pytest.raises(RunError, match="cannot be trained on images of 8 px"):
        memory(reader, CPU)
