"""Running out of memory, told from other errors."""

import pytest
import torch

from cxrfast.errors import RunError, is_out_of_memory


def test_what_another_error_made_of_running_out_of_memory_is_that_too() -> None:
    """torch.save raises a RuntimeError about a position where its buffer cannot grow."""
    position = RuntimeError("unexpected pos 64871232 vs 64871120")
    assert not is_out_of_memory(position)
    position.__context__ = MemoryError()
    assert is_out_of_memory(position)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("FIND was unable to find an engine to execute this computation after trying 3 plans."), True),
        (RuntimeError("CUDA runtime API error cudaErrorMemoryAllocation (2):\nout of memory"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x1024 and 14x1024)"), False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RunError("memory ran out"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_running_out_of_memory_is_told_from_other_errors(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) == expected
