"""What the JSON files of a run hold: the kinds of their values, checked when they are read, since they may come from elsewhere."""

import json
from typing import Annotated, Any, NotRequired, TypedDict

import msgspec


class ConfigFile(TypedDict):
    """config.json."""

    config: dict[str, Any]
    first_epochs: NotRequired[int]
    """Number of epochs that it was started with, as in its hash; absent if it is still that of `config`."""
    hash: NotRequired[str]
    shards: str
    origin: NotRequired[dict[str, Any]]
    division: NotRequired[str]


class Line(TypedDict):
    """A line of metrics.jsonl, one epoch; earlier versions did not write every field."""

    epoch: Annotated[int, msgspec.Meta(ge=0)]
    train_loss: NotRequired[float | None]
    val_loss: NotRequired[float | None]
    val_loss_unweighted: NotRequired[float | None]
    val_auroc: NotRequired[float | None]
    val_auroc_by_label: NotRequired[dict[str, float | None]]
    learning_rate: NotRequired[float | None]
    seconds: NotRequired[float | None]
    images_per_s: NotRequired[float | None]
    waiting_share: NotRequired[float | None]
    size: NotRequired[int | None]


def checked(value: Any, kind: Any) -> Any:
    """`value`, unchanged, if it is of that type. Raises ValueError if not."""
    msgspec.convert(value, kind)
    return value


def read_line(number: int, text: str) -> dict[str, Any]:
    """A line of metrics.jsonl. Raises ValueError naming the line and what is wrong in it."""
    try:
        return checked(json.loads(text), Line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"line {number}: {error}") from error
