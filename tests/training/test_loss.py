"""The loss and its gradients, whatever is masked and however ranks share the batch."""

import numpy as np
import pytest
import torch
from trainings import make_trainer, run_ranks

from cxrfast.training.loss import NEVER, EpochLoss, masked_bce_sum

GRADIENTS = """
import sys
from pathlib import Path
import numpy as np
import torch
from cxrfast.distributed import world
from trainings import make_trainer

shards, folder = map(Path, sys.argv[1:])
with world("cpu") as ranks:
    torch.set_num_threads(1)
    trainer = make_trainer(
        shards, folder / f"of-{ranks.size}-{ranks.rank}", ranks=ranks, global_batch=16, policy="u_ignore"
    )
    (batch, *_) = trainer.order.global_batches(0)
    rng = np.random.default_rng(0)
    for n, row in enumerate(batch.tolist()):
        # micro-batch j of 4 is rows j::4: all entries of the first are masked, and fewer of each later one
        trainer.targets.host_mask[row] = rng.random(14) < (n % 4) / 4
    trainer.targets.mask = torch.from_numpy(trainer.targets.host_mask)
    found = {}
    trainer.optimizer.step = lambda *a, **k: found.update((n, p.grad.clone()) for n, p in trainer.model.named_parameters())
    trainer.model.train()
    trainer.step(batch, trainer.train_loader.epoch(0))
    if ranks.is_first:
        torch.save(found, folder / f"gradients-{ranks.size}.pt")
    del trainer
"""


@pytest.mark.slow
def test_two_ranks_have_the_gradients_of_one_that_accumulates_whatever_is_masked(tiny_set, tmp_path):
    for nproc in (1, 2):
        run_ranks(GRADIENTS, nproc, tiny_set, tmp_path)
    one, two = (torch.load(tmp_path / f"gradients-{n}.pt", weights_only=True) for n in (1, 2))
    assert one.keys() == two.keys()
    assert max(float(gradient.abs().max()) for gradient in one.values()) > 0.01
    for name, gradient in one.items():
        torch.testing.assert_close(two[name], gradient, atol=1e-6, rtol=0, msg=name)


def test_masked_entries_do_not_count_whatever_their_target():
    given = torch.Generator().manual_seed(1)
    logits, target = torch.randn(8, 14, generator=given), torch.rand(8, 14, generator=given).round()
    mask = torch.rand(8, 14, generator=given) < 0.5
    alone = torch.nn.functional.binary_cross_entropy_with_logits(logits[mask], target[mask], reduction="sum")
    assert float(masked_bce_sum(logits, target, mask)) == pytest.approx(float(alone), rel=1e-6)


def test_an_epoch_s_loss_is_this_rank_s_share_and_its_first_bad_step_is_kept():
    epoch = EpochLoss(torch.device("cpu"))
    for step, loss in enumerate((0.5, 1.5, float("nan"), float("nan"))):
        epoch.add(torch.tensor(loss), step, 2)
        assert int(epoch.bad_step) == (NEVER if step < 2 else 2)
        if step == 1:
            assert float(epoch.total) == 1.0


def test_positives_of_rare_labels_may_weigh_more(tiny_set, tmp_path):
    plain, weighed = (make_trainer(tiny_set, tmp_path / f"{on}", positive_weights=on) for on in (False, True))
    row = torch.from_numpy(plain.order.rows)
    logits = torch.zeros((len(row), len(plain.config.labels)))
    positives = (plain.targets.target[row] * plain.targets.mask[row]).sum(dim=0)
    negatives = ((1 - plain.targets.target[row]) * plain.targets.mask[row]).sum(dim=0)
    # each positive counts negatives / positives
    more = torch.where(positives > 0, negatives - positives, 0).sum() * np.log(2)
    assert more > 0
    difference = weighed.targets.loss_sum(logits, row) - plain.targets.loss_sum(logits, row)
    assert float(difference) == pytest.approx(float(more), rel=1e-4)
