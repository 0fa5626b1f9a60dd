"""Networks of one's own: `package.module:factory`, a function that returns one.

Importing runs code. It is done only for a name that the user gave, or declared to be trusted, never for one that merely
stands in a run's files: `trusted` says which.
"""

import inspect
import math
import os
import pkgutil
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from cxrfast.errors import CxrfastError, RunError
from cxrfast.models.head import last_layer
from cxrfast.models.networks.architecture import MEAN, STD, Architecture

ANY = "*"

TRUSTED = "CXRFAST_TRUST_ARCH"
"""Environment variable that names the factories that may be imported, separated by blanks; child processes inherit it."""

SIZES = ("image_size", "img_size")
"""Names of an argument of a factory that takes the side of the images, px."""


@contextmanager
def trusted(arch: str | None) -> Iterator[None]:
    """Allow the import of this `package.module:factory` inside the block, in this process and in those that it starts.

    `ANY`: of every one that a run names; None: of none.
    """
    before = os.environ.get(TRUSTED)
    if arch:
        os.environ[TRUSTED] = f"{before or ''} {arch}"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(TRUSTED, None)
        else:
            os.environ[TRUSTED] = before


def make_own(arch: str, outputs: int, side: int | None) -> Architecture:
    """Import and call a factory. Raises RunError if it is not trusted, or if it returns anything else."""
    if not {arch, ANY} & set(os.environ.get(TRUSTED, "").split()):
        raise RunError(
            f"the network {arch} is code of its author's own, and it is imported only if you say so: add --trust-arch if you trust "
            "it (in Python: `with cxrfast.models.networks.factories.trusted(name):`)"
        )
    factory = imported(arch)
    given = _arguments(arch, factory, outputs, side)
    try:
        net = factory(**given)
    except CxrfastError:
        raise
    except Exception as error:  # a user's code may raise anything: report it with the line that raised
        raise RunError(f"{arch} failed at {where(error, factory)}: {type(error).__name__}: {error}") from error
    if not isinstance(net, nn.Module):
        raise RunError(f"{arch} returned {_what(net)}: it must return a torch.nn.Module")
    if not (weights := list(net.parameters())):
        raise RunError(f"{arch} returned a network without weights: there is nothing to train")
    if other := next((w.dtype for w in weights if w.dtype != torch.float32), None):
        raise RunError(
            f"{arch} returned weights in {str(other).removeprefix('torch.')}: return them in float32; --precision decides what is "
            "computed in"
        )
    mean, std = (_numbers(arch, net, name, default) for name, default in (("mean", MEAN), ("std", STD)))
    if min(std) <= 0:
        raise RunError(f"{arch}: std must be above 0, not {min(std)}")
    return Architecture(net=net, head=last_layer(net, side), mean=mean, std=std, exact=True)


def imported(arch: str) -> Callable[..., Any]:
    """The function or class that `package.module:factory` names. Raises RunError if it cannot be imported."""
    try:
        factory = pkgutil.resolve_name(arch)
    except Exception as error:  # importing runs a user's code
        raise RunError(
            f"the network {arch} cannot be imported ({type(error).__name__}: {error}): install its package, or name its folder in "
            "PYTHONPATH"
        ) from error
    if not callable(factory) or isinstance(factory, nn.Module):
        raise RunError(f"{arch} is {_what(factory)}: name a function that returns a network, or a class")
    return factory


def _arguments(arch: str, factory: Callable[..., Any], outputs: int, side: int | None) -> dict[str, int]:
    """What the factory is called with: num_classes, and the side of the images if it asks for it."""
    kinds = inspect.Parameter
    try:
        taken = inspect.signature(factory).parameters
    except (TypeError, ValueError) as error:
        raise RunError(f"the arguments of {arch} cannot be read ({error}): name a Python function") from error
    names = [n for n, p in taken.items() if p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)]
    takes_any = any(p.kind is kinds.VAR_KEYWORD for p in taken.values())
    if "num_classes" not in names and not takes_any:
        raise RunError(
            f"{arch} has no argument num_classes, the number of logits; it has {', '.join(taken) or 'none'}: write def "
            f"{arch.rpartition(':')[2]}(num_classes)"
        )
    given = {"num_classes": outputs}
    if side is not None:
        given |= {name: side for name in SIZES if name in names}
    if absent := [
        n for n, p in taken.items() if p.default is kinds.empty and n not in given and p.kind not in _VARIABLE
    ]:
        raise RunError(
            f"{arch} needs {' and '.join(absent)}, and is called with {' and '.join(given)} alone: give "
            f"{'it a default' if len(absent) == 1 else 'them defaults'}"
        )
    return given


_VARIABLE = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)


def _numbers(arch: str, net: nn.Module, name: str, default: tuple[float, ...]) -> tuple[float, ...]:
    """`mean` or `std` of a network: one number or three, for pixels in [0, 1]; ImageNet's if it has none."""
    if (value := getattr(net, name, None)) is None:
        return default
    try:
        numbers = torch.as_tensor(value, dtype=torch.float64, device="cpu").flatten().tolist()
    except (TypeError, ValueError, RuntimeError):
        numbers = []
    if len(numbers) not in (1, 3) or not all(map(math.isfinite, numbers)):
        raise RunError(
            f"{arch}: its attribute {name} must be one number or three, for pixels in [0, 1], not {_what(value)}"
        )
    return tuple(numbers * (3 // len(numbers)))


def _what(value: Any) -> str:
    return value.__name__ if isinstance(value, type) else type(value).__name__


def where(error: BaseException, function: Any = None) -> str:
    """`file.py:12`, the last line of the user's own code that an error passed through, else the line that raised."""
    frames = traceback.extract_tb(error.__traceback__)
    code = getattr(function, "__code__", None)
    own = [f for f in frames if code and f.filename == code.co_filename]
    last = (own or frames)[-1]
    return f"{last.filename}:{last.lineno}"
