"""The origin of a run's first weights as text, and the sign and footnote that tables mark it with. Reads no files."""

import re
from collections.abc import Iterable, Mapping
from pathlib import PurePath

from cxrfast.config import TrainConfig
from cxrfast.runs.folder import WEIGHTS

SIGN = "†"
"""Follows the name of a run, or of a group of runs, whose first weights came from another run."""

OTHER_FOLD = ", another fold"
"""End of the text of an origin that is a run of another fold, and which therefore stays in the text of a group."""

FROM_RUN = "from "
"""Start of the text of an origin that is another run."""


def origin_of(config: TrainConfig) -> str:
    """`ImageNet`, `none`, `from densenet121-64/fold-0` for the folder of a run, or the name of a file of weights.

    `from densenet121-64/fold-1, another fold` if it is not this run's: its training rows hold this run's test patients.
    """
    if config.weights in ("imagenet", "none"):
        return {"imagenet": "ImageNet", "none": "none"}[config.weights]
    path = PurePath(config.weights)
    if path.name == WEIGHTS:
        path = path.parent
    elif path.suffix in (".pth", ".pt", ".safetensors"):
        return path.name
    if (fold := re.fullmatch(r"fold-(\d+)", path.name)) and int(fold[1]) != config.fold and len(path.parts) > 1:
        return FROM_RUN + "/".join(path.parts[-2:]) + OTHER_FOLD
    return FROM_RUN + "/".join(path.parts[-2:])


def shared_origin(origins: Iterable[str]) -> str:
    """Origin of a group of runs, without their fold: `from densenet121-64`. Several are joined by `; `."""
    return "; ".join(dict.fromkeys(re.sub(r"/fold-\d+$", "", origin) for origin in origins))


def group_origins(origins: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Shared origin of each group, from the name of the group and the origin of each of its runs."""
    groups: dict[str, list[str]] = {}
    for name, origin in origins:
        groups.setdefault(name, []).append(origin)
    return {name: shared_origin(group) for name, group in groups.items()}


def marked_name(name: str, origin: str) -> str:
    """`name`, with the sign if the first weights came from another run."""
    return name + SIGN if origin.startswith(FROM_RUN) else name


def origin_footnote(origins: Mapping[str, str]) -> str:
    """Explanation of the sign, from the origin of each name; empty if no name has the sign."""
    marked = {name: origin for name, origin in origins.items() if origin.startswith(FROM_RUN)}
    if not marked:
        return ""
    smaller = all(0 < _scale(origin) < _scale(name) for name, origin in marked.items())
    which = "the run of a smaller scale" if smaller else "another run"
    return f"{SIGN} weights started from {which}: {', '.join(f'{n} {o}' for n, o in marked.items())}."


def _scale(name: str) -> int:
    """The number at the end of a group's name, as `densenet121-64`; 0 if there is none."""
    found = re.search(rf"-(\d+)(?:/fold-\d+{OTHER_FOLD})?$", name)
    return int(found[1]) if found else 0
