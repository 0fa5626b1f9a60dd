"""Where and how a training runs: what does not change its weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cxrfast.config.option import Option
from cxrfast.errors import RunError

ENGINES = ("auto", "dali", "host")

COMPILE_MODES = ("default", "max-autotune-no-cudagraphs")
"""Modes of torch.compile that work with gradient accumulation; see `Runtime.compile`."""

YEAR = 365 * 24 * 60
"""Minutes; the longest time that may be waited for something."""

MOST_THREADS = 1024
"""Decoding threads per process."""


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Where and how a training runs. Nothing here changes the rows, their order or the training options."""

    shards: Path
    runs: Path
    name: Annotated[str | None, Option("Folder of this run's folds. [default: ARCH-SCALE]")] = None
    subset: Annotated[
        Path | None,
        Option("Use only the rows in this file: one row number per line.", name="rows", metavar="FILE"),
    ] = None
    device: Annotated[str, Option("auto, cpu or cuda.")] = "auto"
    engine: Annotated[str, Option("Decoder of the images.", choices=ENGINES)] = "auto"
    threads: Annotated[
        int | None, Option("Decoding threads per process. [default: usable cores / processes]", minimum=1)
    ] = None
    cache: Annotated[
        Path | None,
        Option("Keep decoded pixels here, on a local disk; may be deleted at any time.", metavar="DIR"),
    ] = None
    stage: Annotated[
        Path | None, Option("Copy the scale to this local disk first, once per machine.", metavar="DIR")
    ] = None
    checkpoint_minutes: Annotated[float, Option("Minutes between checkpoints, at most.")] = 10.0
    checkpoint_steps: Annotated[int | None, Option("Optimiser steps between checkpoints, at most.", minimum=1)] = None
    recompute: Annotated[
        bool, Option("Recompute activations in the backward pass: the same result, slower, in less memory.")
    ] = False
    compile: Annotated[str | None, Option(f"torch.compile: {' or '.join(COMPILE_MODES)}.", metavar="MODE")] = None
    tensorboard: Annotated[bool, Option("Also write TensorBoard events into the run.")] = False
    profile: Annotated[bool, Option("Write a trace of a few steps: profile.json in the run.")] = False
    dist_timeout: Annotated[float, Option("Minutes a rank waits for the others before it gives up.")] = 10.0
    deterministic: Annotated[bool, Option("Bitwise repeatable on a GPU, slower; a CPU always is.")] = False

    def __post_init__(self) -> None:
        for name in ("checkpoint_minutes", "dist_timeout"):
            if not 0 < getattr(self, name) <= YEAR:
                raise RunError(
                    f"--{name.replace('_', '-')} {getattr(self, name):g} must be above 0 and at most {YEAR:,} minutes"
                )
        from cxrfast.text import name_fault

        if self.name is not None and (fault := name_fault(self.name) or _folder_fault(self.name)):
            raise RunError(f"--name {self.name!r} {fault}: give the name of one folder, such as densenet121-256-warm")
        if self.threads is not None and self.threads > MOST_THREADS:
            raise RunError(f"--threads must be at most {MOST_THREADS:,}, not {self.threads:,}")
        if self.compile in ("reduce-overhead", "max-autotune"):
            raise RunError(
                f"--compile {self.compile} captures CUDA graphs, which fail when gradients are accumulated over "
                f"micro-batches or DALI frees memory during the capture: use {' or '.join(COMPILE_MODES)}"
            )
        if self.compile is not None and self.compile not in COMPILE_MODES:
            raise RunError(f"--compile {self.compile} is unknown: use {' or '.join(COMPILE_MODES)}")


def _folder_fault(name: str) -> str | None:
    """Why this cannot be the name of a folder; None if it can."""
    if not name.strip():
        return "is empty"
    return "leads to another folder" if "/" in name or name in (".", "..") else None
