"""Reads files of weights, of safetensors or of torch, which may come from elsewhere: nothing in them is executed."""

import hashlib
import io
import json
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load

from cxrfast.errors import RunError
from cxrfast.files import read_file

RECORD = "cxrfast"
"""Name of a run's record in the metadata of its weights and in its checkpoint: JSON text."""

NESTED = ("state_dict", "model_state_dict", "model", "module", "net")
"""Names under which training scripts put the weights into a checkpoint, which may be nested."""

DEEPEST = 4
"""Levels that are looked into."""

LARGEST = 2**33
"""Bytes of a file of weights; torchvision's largest has 2.6 GB."""


@dataclass(frozen=True)
class WeightsFile:
    """What a file of weights holds. Nothing in it is executed."""

    name: str
    tensors: dict[str, torch.Tensor]
    """By their names in the file."""
    record: dict[str, Any]
    """What the run that trained them wrote there about itself, see `runs.lineage.Origin`; {} in other files."""
    config_hash: str | None
    """Hash of that run's configuration, which files of earlier versions hold without a record."""
    sha256: str


def read_weights_file(path: Path) -> WeightsFile:
    """Read a file of safetensors or of torch. Raises RunError if it is neither, is damaged, or would execute code."""
    try:
        data = read_file(path, LARGEST)
    except OSError as error:
        raise RunError(f"{path} {error.strerror}: give a .pth or .safetensors file, or the folder of a run") from error
    if not data:
        raise RunError(f"{path} is not a checkpoint: it is empty")
    try:
        if path.suffix == ".safetensors" or data[8:9] == b"{":
            content = load(data)
            about = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__") or {}
        else:
            with warnings.catch_warnings(action="ignore"):
                content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            about = content if isinstance(content, Mapping) else {}
        # other programs may use the same names
        record = json.loads(about[RECORD]) if isinstance(about.get(RECORD), str) else {}
        owner = record.get("config_hash") or about.get("config_hash")
    except pickle.UnpicklingError as error:
        raise RunError(
            f"{path} is not a checkpoint that can be loaded: it is damaged, or it holds Python objects, which could execute "
            "code: save the state_dict() of the model, not the model"
        ) from error
    except Exception as error:  # torch and safetensors raise half a dozen unrelated classes for other files
        raise RunError(
            f"{path} is not a checkpoint ({type(error).__name__}): it is damaged, or another kind of file"
        ) from error
    tensors = _state_dict(content)
    if not tensors:
        held = f"it holds {list(content)[:3]}" if isinstance(content, Mapping) else f"it is a {type(content).__name__}"
        raise RunError(f"{path} is not a checkpoint of a model: no tensors with names were found, {held}")
    owner = owner if isinstance(owner, str) else None
    return WeightsFile(path.name, tensors, record, owner, hashlib.sha256(data).hexdigest())


def _state_dict(content: Any) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint by name, from the top or from where training scripts nest them; {} if there are none."""
    for _ in range(DEEPEST):
        if not isinstance(content, Mapping):
            break
        inner = [content[name] for name in NESTED if isinstance(content.get(name), Mapping)]
        if not inner:
            return {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, torch.Tensor)}
        content = inner[0]
    return {}
