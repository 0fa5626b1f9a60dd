"""Which engine decodes where nobody says: one function over a table of measured rates. Pure: looks at no device."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

HEADROOM = 1.2
"""Host threads must be this much faster than the training step before they are chosen, since rates vary."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Images/s on one kind of GPU at one scale, decoded and turned."""

    scale: int
    """Side of the images, px."""
    host: float
    """Of one core of the CPU."""
    dali: float
    """Of the GPU, while it does nothing else."""
    step: float
    """That a training step on a cached batch asks for: densenet121 as fast as it was measured, compiled if it was."""


MEASURED: Mapping[str, Sequence[Rates]] = {}
"""By the GPU's name, as torch gives it; filled from what `bench/gpu_trial.sh` measures. Empty: none has been measured."""


def choose(
    gpu: str | None,
    has_dali: bool,
    scale: int,
    threads: int,
    measured: Mapping[str, Sequence[Rates]] = MEASURED,
) -> tuple[str, str]:
    """`host` or `dali`, and why, for people.

    `gpu`: its name, None on a CPU. `threads`: of the host engine, one core each. Where both would keep the training step
    fed, host is better: its threads leave the GPU's memory bandwidth, which bounds the step, to the step.
    """
    if gpu is None:
        return "host", "on a CPU its threads are several times as fast as DALI's"
    if not has_dali:
        return "host", "NVIDIA DALI is not installed"
    if not measured.get(gpu):
        return "dali", f"{gpu} has not been measured; with many cores a GPU, --engine host is worth a try"
    rates = min(measured[gpu], key=lambda rates: abs(rates.scale - scale))
    host, step = threads * rates.host, rates.step
    compared = f"{threads} host threads give {host:,.0f} images/s, DALI {rates.dali:,.0f}, the step takes {step:,.0f}"
    if host >= HEADROOM * step or host >= rates.dali:
        return "host", f"at {rates.scale} px {compared}"
    return "dali", f"at {rates.scale} px {compared}"
