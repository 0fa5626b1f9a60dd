"""`cxrfast doctor --deep`: proves in about a minute that this machine loads and trains as it should.

A shard set comes in, or phantoms are made; one line per check goes out as soon as it is done. A failed check does not
stop the others. Files are written into temporary folders only.
"""

import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from cxrfast import log
from cxrfast.distributed import pick_device
from cxrfast.doctor.gradients import IMAGES, compiled_step, gradients, no_compiler
from cxrfast.doctor.pixels import dali_pixels, host_pixels, proven_pixels, slow_reader
from cxrfast.doctor.process_group import process_group
from cxrfast.doctor.training_step import memory, synchronisations
from cxrfast.errors import CxrfastError, LoadError
from cxrfast.phantoms.dataset import synth
from cxrfast.pipelines import dali
from cxrfast.pipelines.reader import Reader
from cxrfast.shards.build import build
from cxrfast.shards.shard_set import ShardSet

PHANTOMS, PHANTOM_SCALE = 128, 256
"""Number of phantoms and their side, px."""

HW_DECODER_LOADS = (0.0, 0.65, 1.0)
"""Fractions of the images that a GPU's JPEG engines decode: none, DALI's default, all (ours)."""

OK, FAILED, SKIPPED = "ok", "FAILED", "skipped"


@dataclass(frozen=True)
class Check:
    name: str
    make: Callable[[], str]
    """Returns what was measured; raises where something is wrong."""
    skipped: str = ""
    """Why this machine cannot make it; empty if it can."""


@dataclass(frozen=True)
class Outcome:
    name: str
    state: str
    """OK, FAILED or SKIPPED."""
    measured: str
    """What was measured, what is wrong, or why it was skipped."""


def checkup(shards: Path | None = None, scale: int | None = None) -> list[Outcome]:
    """Make and print all checks on the device that training would take.

    `shards`: set whose images are used; None makes phantoms. `scale`: side of the images, px; default: the set's smallest.
    Raises DeviceError, ShardError or LoadError where device or set cannot be used at all.
    """
    device = pick_device("auto")
    with tempfile.TemporaryDirectory(prefix="cxrfast-doctor-") as place:
        folder = shards or _phantoms(Path(place))
        scales = ShardSet(folder).scales
        if not scales:
            raise LoadError(f"{folder} holds no shards: build them with `cxrfast shard`")
        with Reader(folder, scale or scales[0]) as reader:
            print(f"Checks on {device} with {shards or 'phantoms'} at {reader.scale} px", flush=True)
            return [carry_out(check) for check in checks(reader, device)]


def checks(reader: Reader, device: torch.device) -> list[Check]:
    """All checks, in the order in which they are made."""
    gpu = device.type == "cuda"
    no_dali = "" if dali.available() else "DALI is not installed"
    too_few = f"the set has fewer than {IMAGES} images" if len(reader.rows) < IMAGES else ""
    loads = {f", {load:.0%} by JPEG engines": load for load in HW_DECODER_LOADS} if gpu else {"": 1.0}
    return [
        Check("host's pixels", partial(host_pixels, reader, device)),
        *(
            Check(f"DALI's pixels{by}", partial(dali_pixels, reader, device, load), no_dali)
            for by, load in loads.items()
        ),
        Check("DALI's pixels, the set's means", partial(proven_pixels, reader, device), no_dali),
        Check("host, slow reader", partial(slow_reader, reader, device, "host")),
        Check("DALI, slow reader", partial(slow_reader, reader, device, "dali"), no_dali),
        Check("gradients", partial(gradients, reader, device), too_few),
        Check("process group", partial(process_group, device)),
        Check("synchronisations", partial(synchronisations, reader, device), "" if gpu else "no GPU"),
        Check("compiled step", partial(compiled_step, device), no_compiler()),
        Check("memory", partial(memory, reader, device)),
    ]


def carry_out(check: Check) -> Outcome:
    """Make one check and print it: its name first, so that one that hangs or kills the process is known."""
    print(f"{check.name:<37}", end="", flush=True)
    begun = time.monotonic()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own would tear the line apart
            state, measured = (SKIPPED, check.skipped) if check.skipped else (OK, check.make())
    except Exception as error:  # a failed check must not stop the others
        first = (str(error).strip().splitlines() or [""])[0]
        state, measured = FAILED, first if isinstance(error, CxrfastError) else f"{type(error).__name__}: {first}"
    print(f"{state:<9}{time.monotonic() - begun:5.1f} s  {measured}", flush=True)
    return Outcome(check.name, state, measured)


def failed(outcomes: list[Outcome]) -> str:
    """The closing message; empty if none failed."""
    names = [outcome.name for outcome in outcomes if outcome.state == FAILED]
    return f"{len(names)} of {len(outcomes)} checks failed ({'; '.join(names)}): see their lines above" if names else ""


def _phantoms(place: Path) -> Path:
    """Make a shard set of phantoms below `place`."""
    synth(place / "tree", images=PHANTOMS, size=PHANTOM_SCALE)
    with log.quiet():
        build(place / "tree", place / "set", [PHANTOM_SCALE])
    return place / "set"
