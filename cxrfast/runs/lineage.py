"""Where the first weights of runs came from, and how tables say so. Reads configurations only, no files."""

import re
from collections.abc import Iterable, Mapping
from pathlib import PurePath

from cxrfast.config import TrainConfig
from cxrfast.runs.folder import WEIGHTS

SIGN = "†"
FROM = "from "


def start_of(config: TrainConfig) -> str:
    """`ImageNet`, `none`, `from densenet121-64/fold-0` for the folder of a run, or the name of a file of weights."""
    if config.weights in ("imagenet", "none"):
        return {"imagenet": "ImageNet", "none": "none"}[config.weights]
    path = PurePath(config.weights)
    if path.name == WEIGHTS:
        path = path.parent
    elif path.suffix in (".pth", ".pt", ".safetensors"):
        return path.name
    return FROM + "/".join(path.parts[-2:])


def shared_start(starts: Iterable[str]) -> str:
    """That of a group from those of its runs, whose fold is left out: `from densenet121-64`. Several: joined by `; `."""
    return "; ".join(dict.fromkeys(re.sub(r"/fold-\d+$", "", start) for start in starts))


def mark(name: str, start: str) -> str:
    """`name`, with the footnote's sign if it started from another run."""
    return name + SIGN if start.startswith(FROM) else name


def footnote(starts: Mapping[str, str]) -> str:
    """What the sign means, from the start of each name; empty where no name carries it."""
    marked = {name: start for name, start in starts.items() if start.startswith(FROM)}
    if not marked:
        return ""
    smaller = all(0 < _scale(start) < _scale(name) for name, start in marked.items())
    which = "the run of a smaller scale" if smaller else "another run"
    return f"{SIGN} weights started from {which}: {', '.join(f'{n} {s}' for n, s in marked.items())}."


def _scale(name: str) -> int:
    """The number at the end of a group's name, as `densenet121-64`; 0 if there is none."""
    found = re.search(r"-(\d+)$", name)
    return int(found[1]) if found else 0
