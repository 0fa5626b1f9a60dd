"""Fields of TrainConfig and Runtime as command-line arguments."""

from collections.abc import Mapping
from typing import Any

from cxrfast.config.option import options_of
from cxrfast.config.runtime import Runtime
from cxrfast.config.training import TrainConfig
from cxrfast.errors import RunError


def as_arguments(values: Mapping[str, Any]) -> list[str]:
    """Command-line arguments that set fields of TrainConfig and Runtime to these values. Defaults are left out.

    Raises RunError for a field that has no option.
    """
    options = options_of(TrainConfig) | options_of(Runtime)
    arguments = []
    for name, value in values.items():
        if name not in options:
            raise RunError(f"{name} has no command-line option: to set it, train from Python in a single process")
        option, _, default = options[name]
        if value is not None and value != default:
            items = value if option.multiple else [value]
            arguments += [option.flag(name) + ("" if one is True else f"={option.write(one)}") for one in items]
    return arguments
