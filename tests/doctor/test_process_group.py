"""A process group that fails, hangs or answers wrongly is refused."""

import sys

import pytest
import torch
from batches import CPU
from commands import run

from cxrfast.doctor import process_group as group_module
from cxrfast.doctor.process_group import process_group
from cxrfast.errors import RunError


def test_a_process_group_of_one_rank_works_here() -> None:
    assert process_group(CPU).startswith("gloo: gradients as without a group")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_process_group_that_cannot_be_made_says_why() -> None:
    with pytest.raises(RunError, match=r"a group of one rank on cuda:0 fails: \w*Error: "):
        process_group(torch.device("cuda", 0))


def test_a_process_group_that_does_not_answer_is_given_up(monkeypatch) -> None:
    monkeypatch.setattr(group_module, "GROUP_SECONDS", 0.01)
    with pytest.raises(RunError, match="no answer within"):
        process_group(CPU)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("dist.gather_object = lambda *given: None", "gather_object gives"),
        ("dist.broadcast = lambda buffer, src: buffer.add_(1)", "broadcast gives False"),
        (
            "forward = DDP.forward; DDP.forward = lambda self, image: 1.01 * forward(self, image)",
            "the gradient of 1 micro-batches differs",
        ),
    ],
)
def test_a_process_group_that_answers_wrongly_is_refused(fault: str, message: str) -> None:
    script = (
        "import torch, torch.distributed as dist\n"
        "from torch.nn.parallel import DistributedDataParallel as DDP\n"
        "from cxrfast.doctor.process_group import one_rank\n"
        f"{fault}\n"
        "one_rank(torch.device('cpu'))"
    )
    done = run(sys.executable, "-c", script)
    assert done.returncode != 0
    assert message in done.stderr
