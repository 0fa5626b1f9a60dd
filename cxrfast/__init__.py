"""Train chest X-ray classifiers at full resolution without waiting for I/O.

The names in `__all__` are the public API. Each is imported on first use, so that `import cxrfast` loads nothing else.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cxrfast.exports.load import load
    from cxrfast.pipelines.loader import Loader
    from cxrfast.pipelines.order import Augment, EvalOrder, TrainOrder
    from cxrfast.pipelines.reader import Reader
    from cxrfast.runs.run import Run
    from cxrfast.shards.build import build
    from cxrfast.shards.shard_set import ShardSet
    from cxrfast.shards.sources.source import Source

__version__ = "0.1.0"

__all__ = [
    "Augment",
    "EvalOrder",
    "Loader",
    "Reader",
    "Run",
    "ShardSet",
    "Source",
    "TrainOrder",
    "__version__",
    "build",
    "load",
]

MODULES = {
    "Augment": "cxrfast.pipelines.order",
    "EvalOrder": "cxrfast.pipelines.order",
    "Loader": "cxrfast.pipelines.loader",
    "Reader": "cxrfast.pipelines.reader",
    "Run": "cxrfast.runs.run",
    "ShardSet": "cxrfast.shards.shard_set",
    "Source": "cxrfast.shards.sources.source",
    "TrainOrder": "cxrfast.pipelines.order",
    "build": "cxrfast.shards.build",
    "load": "cxrfast.exports.load",
}
"""Where each name of the public API is defined."""


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module 'cxrfast' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
