"""What a training is: its configuration, its presets by scale, its command-line options, and default folders.

Each field that can be set on the command line says so once, in its type: `cxrfast.cli.options` makes the options of `train`
and `study` from it, and `as_arguments` turns values back into arguments.
"""

from cxrfast.config.arguments import as_arguments
from cxrfast.config.option import Option, options_of
from cxrfast.config.presets import DATA, PRESETS, RUNS, SHARDS, Preset, learning_rate, preset
from cxrfast.config.recipe import recipe_in_words
from cxrfast.config.runtime import COMPILE_MODES, ENGINES, MOST_THREADS, YEAR, Runtime
from cxrfast.config.training import (
    AUTO,
    LARGEST,
    LATER,
    ORDERS,
    PRECISIONS,
    SPLITS,
    VALIDATION_COST,
    TrainConfig,
    label_differences,
)

__all__ = [
    "AUTO",
    "COMPILE_MODES",
    "DATA",
    "ENGINES",
    "LARGEST",
    "LATER",
    "MOST_THREADS",
    "ORDERS",
    "PRECISIONS",
    "PRESETS",
    "RUNS",
    "SHARDS",
    "SPLITS",
    "VALIDATION_COST",
    "YEAR",
    "Option",
    "Preset",
    "Runtime",
    "TrainConfig",
    "as_arguments",
    "label_differences",
    "learning_rate",
    "options_of",
    "preset",
    "recipe_in_words",
]
