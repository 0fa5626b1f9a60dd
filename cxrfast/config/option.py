"""Command-line options that are made from fields: the field's type says once what the option is."""

from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from typing import Any, get_args


@dataclass(frozen=True)
class Option:
    """Describes the command-line option of a field. Its default is the field's."""

    help: str
    name: str = ""
    """Default: the field's, with dashes."""
    minimum: int | None = None
    choices: tuple[str, ...] | None = None
    metavar: str | None = None
    multiple: bool = False
    """The option is given once per item of a tuple."""
    write: Callable[[Any], str] = str
    """Turns a value, or an item of a `multiple` one, into the option's text."""

    def flag(self, field: str) -> str:
        return f"--{self.name or field.replace('_', '-')}"


def options_of(kind: type) -> dict[str, tuple[Option, Any, Any]]:
    """Option, type and default (None if there is none) of each field of TrainConfig or Runtime that has an option."""
    return {
        f.name: (option, type_, None if f.default is MISSING else f.default)
        for f in fields(kind)
        for type_, option in [get_args(f.type)[:2] or (None, None)]
        if isinstance(option, Option)
    }
