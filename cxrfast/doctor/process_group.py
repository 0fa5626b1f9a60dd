"""A check of training on several GPUs: a process group of one rank answers, and leaves gradients as they are.

A device comes in; what was measured goes out, in words, or RunError is raised. The group runs in its own process, which
is this module as a script.
"""

import copy
import gc
import subprocess
import sys
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from cxrfast.distributed import parallel
from cxrfast.doctor.gradients import SAME, accumulated, relative_error, tiny_network
from cxrfast.errors import RunError

GROUP_SECONDS = 60.0
"""Timeout of a process group."""


def process_group(device: torch.device) -> str:
    """A process group of one rank, in its own process, does everything that a training needs."""
    command = [sys.executable, "-m", "cxrfast.doctor.process_group", str(device)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GROUP_SECONDS)
    except subprocess.TimeoutExpired:
        raise RunError(
            f"no answer within {GROUP_SECONDS:g} s: run `{' '.join(command)}` with NCCL_DEBUG=INFO to see where it waits"
        ) from None
    if done.returncode:
        tail = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise RunError(f"a group of one rank on {device} fails: {tail}")
    return done.stdout.strip()


def one_rank(device: torch.device) -> str:
    """Make a group of one rank, use it as a training does, and leave it. Raises RunError for a wrong answer."""
    gpu, timeout = device.type == "cuda", timedelta(seconds=GROUP_SECONDS)
    backend = "nccl" if gpu else "gloo"
    if gpu:
        torch.cuda.set_device(device)
    store = dist.TCPStore("127.0.0.1", 0, world_size=1, is_master=True, timeout=timeout)
    at = device if gpu else None
    dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout, device_id=at)
    votes = torch.tensor([3, 1])
    group = dist.new_group(backend="gloo", timeout=timeout)
    work: Any = dist.all_reduce(votes, dist.ReduceOp.MAX, group=group, async_op=True)  # type: ignore[arg-type]
    work.wait()
    _same("votes", votes.tolist(), [3, 1])
    model, difference = tiny_network(device), 0.0
    for micro_batches in (1, 2):  # of which the last one is synchronised
        ddp = parallel(copy.deepcopy(model))
        found = accumulated(ddp, micro_batches, ddp.no_sync)[1]
        error = relative_error(found, accumulated(copy.deepcopy(model), micro_batches)[1])
        if not error <= SAME:
            raise RunError(
                f"the gradient of {micro_batches} micro-batches differs by {error:.0e} under DistributedDataParallel"
            )
        difference = max(difference, error)
    gathered: list[Any] = [None]
    dist.gather_object({"loss": 0.5}, gathered)
    _same("gather_object", gathered, [{"loss": 0.5}])
    sent = ["start"]
    dist.broadcast_object_list(sent, device=device)
    _same("broadcast_object_list", sent, ["start"])
    for buffer in model.buffers():
        before = buffer.clone()
        dist.broadcast(buffer, src=0)
        _same("broadcast", torch.equal(buffer, before), True)
    dist.barrier()
    gc.collect()
    dist.destroy_process_group()
    return f"{backend}: gradients as without a group (within {difference:.0e}), votes, objects, buffers, barrier"


def _same(what: str, found: object, expected: object) -> None:
    if found != expected:
        raise RunError(f"{what} gives {found}, not {expected}")


if __name__ == "__main__":
    try:
        print(one_rank(torch.device(sys.argv[1])))
    except Exception as error:  # the parent process reports it
        sys.exit(f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}")
