"""Types of parameters, and the options that several commands share or that are made from `cxrfast.config`."""

import math
import tomllib
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from cxrfast import config
from cxrfast.config import options_of
from cxrfast.errors import RunError
from cxrfast.files import read_file
from cxrfast.text import shown

Command = Callable[..., None]
Decorator = Callable[[Command], Command]


class LocalPath(click.Path):
    """A local path. A URL is refused as it was typed, before `Path` removes one of its slashes."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if "://" in str(value):
            self.fail(
                f"{value} is a URL, but this must be a local path: `cxrfast stage` copies a set from a URL to a folder, or "
                "back",
                param,
                ctx,
            )
        return super().convert(value, param, ctx)


def config_file(command: Command) -> Command:
    """`--config FILE`: options of this command from a TOML file."""
    return click.option(
        "--config",
        type=FILE,
        metavar="FILE",
        is_eager=True,
        expose_value=False,
        callback=read_toml,
        help="Read options from a TOML file, with the names used here; the command line wins.",
    )(command)


FOLDER = LocalPath(path_type=Path, file_okay=False)
FILE = LocalPath(path_type=Path)
COUNT = click.IntRange(min=1)

RUNS = click.argument("runs", type=FOLDER, default=config.RUNS)
EACH_RUN = click.argument("runs", type=FOLDER, nargs=-1, required=True, metavar="RUN...")
SET = click.argument("shards", type=FOLDER, metavar="SET")
MOVED_SHARDS = click.option(
    "--shards", type=FOLDER, help="Where the shard set is now. [default: where it was in training]"
)
DEVICE = click.option("--device", default="auto", help="auto, cpu or cuda.")


def flag(name: str, help: str, field: str | None = None) -> Decorator:
    """An option without a value; `field`: its argument, if not named like the option."""
    return click.option(name, *([field] if field else []), is_flag=True, help=help)


def scales(help: str, required: bool = False) -> Decorator:
    return click.option(
        "--scale",
        "scales",
        type=SCALES,
        multiple=True,
        required=required,
        callback=_joined,
        help=help,
        metavar="INTEGER",
    )


def _joined(ctx: click.Context, param: click.Parameter, values: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
    return tuple(scale for some in values for scale in some)


def workers(help: str) -> Decorator:
    return click.option("--workers", type=COUNT, help=help)


class RuleType(click.ParamType):
    """Text that becomes a rule for thresholds."""

    name = "rule"

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return "RULE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from cxrfast.thresholds import Rule

        try:
            return value if isinstance(value, Rule) else Rule.parse(value)
        except RunError as error:
            self.fail(str(error), param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        known = ("youden", "sensitivity=0.9", "specificity=0.9")
        return [CompletionItem(text) for text in known if text.startswith(incomplete)]


RULE = RuleType()


class Parsed(click.ParamType):
    """Text that `parse` turns into a tuple; its ValueError refuses the text."""

    def __init__(self, name: str, example: str, parse: Callable[[str], tuple[Any, ...]]) -> None:
        self.name, self.example, self.parse = name, example, parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        try:
            return value if isinstance(value, tuple) else self.parse(str(value))
        except ValueError:
            self.fail(f"{value!r} is not {self.name}, such as {self.example}", param, ctx)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


SCALES = Parsed("a whole number of px", "256 or 256,1024", _numbers)


def _part(text: str) -> tuple[int, int]:
    i, n = map(int, text.split("/"))
    if not 1 <= i <= n:
        raise ValueError
    return i, n


def _sizes(text: str) -> tuple[tuple[int, int], ...]:
    return tuple((int(side), int(epochs)) for side, epochs in (size.split("x") for size in text.split(",")))


def _label_policy(text: str) -> tuple[str, str]:
    label, policy = text.rsplit("=", 1)
    return label, policy


def _blank(text: str) -> tuple[str, str]:
    label, _, policy = text.rpartition("=")
    return label, policy


def _rate(text: str) -> tuple[int, float]:
    scale, rate = text.split("=")
    if not 0 < float(rate) < math.inf:
        raise ValueError
    return int(scale), float(rate)


PART = Parsed("I/N", "2/8, with I from 1 to N", _part)
SIZES = Parsed("SIDExEPOCHS,…", "64x2,96x2", _sizes)
BLANK = Parsed("[LABEL=]POLICY", "ignore or Edema=ignore", _blank)
LABEL_POLICY = Parsed("LABEL=POLICY", "Edema=u_ones", _label_policy)
RATE = Parsed("SCALE=IMAGES_PER_S", "2048=75", _rate)


class MicroBatch(click.IntRange):
    """A number of images, or `auto`."""

    name = "INTEGER|auto"

    def __init__(self) -> None:
        super().__init__(min=1)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if value == "auto" else super().convert(value, param, ctx)


class Finite(click.FloatRange):
    """A finite number in a range."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


LARGEST_TOML = 2**20
"""Bytes of a file of options."""


def read_toml(ctx: click.Context, param: click.Parameter, path: Path | None) -> Path | None:
    """Take options of this command from a TOML file; options on the command line win."""
    if path is None:
        return None
    try:
        content = tomllib.loads(read_file(path, LARGEST_TOML).decode("utf-8-sig"))
    except OSError as error:
        raise click.BadParameter(f"{path} cannot be read: {error.strerror}", ctx, param) from error
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise click.BadParameter(f"{path} is not a TOML file ({why})", ctx, param) from error
    known = {option: option_ for option_ in ctx.command.params for option in option_.opts}
    found = {}
    for name, value in content.items():
        option = known.get(f"--{name.replace('_', '-')}")
        if option is None or option is param:
            names = ", ".join(sorted(o.removeprefix("--").replace("-", "_") for o in known if o.startswith("--")))
            raise click.BadParameter(
                f"{path} sets {shown(name)}, which is not an option: the options are {names}", ctx, param
            )
        values = value if option.multiple and isinstance(value, list) else [value]
        if fault := next(filter(None, (_toml_fault(option, one) for one in values)), None):
            raise click.BadParameter(f"{path}: {name} = {shown(_spelt(value))} {fault}", ctx, param)
        # numbers as the command line has them: click would cut 1.5 to a whole 1
        texts = [one if isinstance(one, bool) else str(one) for one in values]
        found[option.name] = texts if option.multiple else texts[0]
    ctx.default_map = {**(ctx.default_map or {}), **found}
    return path


TOML_KINDS = {bool: "true or false", list: "a list", dict: "a table"}


def _toml_fault(option: click.Parameter, value: Any) -> str | None:
    """What is wrong with a value of an option in a TOML file, for a message; None if the command line could hold it."""
    if getattr(option, "is_flag", False):
        return None if isinstance(value, bool) else "must be true or false"
    if isinstance(option.type, click.Path) and not isinstance(value, str):  # a number would be an open file
        return "must be text"
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return f"must be a number or text, not {TOML_KINDS.get(type(value), 'a date or time')}"
    if "\0" in (text := _spelt(value)):  # which a command line cannot hold, nor the name of a file
        return "holds the character U+0000"
    return "is too large" if text == TOO_LONG else None


TOO_LONG = "a number of thousands of digits"


def _spelt(value: Any) -> str:
    """A value of a TOML file as text; Python refuses to spell the largest hexadecimal numbers."""
    try:
        return str(value)
    except ValueError:
        return TOO_LONG


SOURCE_OPTIONS: dict[str, dict[str, Any]] = {
    "labels": {"type": click.Choice(["chexpert", "negbio"]), "help": "mimic: labeller. [default: chexpert]"},
    "table": {"metavar": "FILE", "help": "table: .csv, .tsv or .parquet, a path or URL."},
    "path_column": {"help": "table: paths. [default: path, file, filename …]"},
    "patient_column": {"help": "table: patients. [default: patient_id, subject_id, patient …]"},
    "label": {"multiple": True, "help": "table: column of a label; repeatable. [default: no labels]"},
    "keep": {"multiple": True, "help": "Column to carry along, such as age or sex; repeatable."},
    "find_by_name": {"is_flag": True, "help": "table: look for files by their names alone, in all folders."},
    "image_column": {"help": "table: image ids. [default: paths without suffix]"},
    "study_column": {"help": "table: studies. [default: each image is one]"},
    "view_column": {"help": "table: view positions. [default: unknown]"},
    "allow_unmatched": {"is_flag": True, "help": "mimic, nih: accept tables that name other studies or images."},
    "split_column": {"help": "table: train, validate, test, or folds, 0 to 4. [default: none]"},
}
"""By argument of the sources' functions; `read_source` refuses those that the chosen one does not have."""


def of_source(command: Command) -> Command:
    """Options of `shard` that say what the source tree is and how its tables are read."""
    for name, settings in reversed(SOURCE_OPTIONS.items()):
        metavar = {} if "is_flag" in settings else {"metavar": "NAME"}
        command = click.option(f"--{name.replace('_', '-')}", **{**metavar, **settings})(command)
    source = click.option("--source", default="mimic", help="mimic, chexpert, nih, table or package.module:name.")
    return click.option("--data", default=config.DATA, help="Source tree; or set CXRFAST_DATA.")(source(command))


def chosen_source(options: dict[str, Any]) -> dict[str, Any]:
    """Take the options of one source that were given out of `options`."""
    values = {name: options.pop(name) for name in SOURCE_OPTIONS}
    return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items() if v not in (None, (), False)}


TYPES = {"micro_batch": MicroBatch(), "sizes": SIZES, "label_policies": LABEL_POLICY, "blank": BLANK}
"""Options whose help differs from the text in the field's type."""


def configuration_options(kind: type, names: Container[str] | None = None) -> Decorator:
    """Add the options of TrainConfig or Runtime to a command: all, or only the fields `names`."""

    def add(command: Command) -> Command:
        for name, (option, kind_, default) in reversed(options_of(kind).items()):
            if names is None or name in names:
                command = click.option(
                    option.flag(name),
                    name,
                    type=_type(name, option, kind_),
                    is_flag=kind_ is bool,
                    multiple=option.multiple,
                    default=default,
                    metavar=option.metavar,
                    help=option.help,
                )(command)
        return command

    return add


def _type(name: str, option: config.Option, kind: Any) -> Any:
    if name in TYPES:
        return TYPES[name]
    if option.choices:
        return click.Choice(option.choices)
    if option.minimum is not None:
        return click.IntRange(min=option.minimum)
    if kind == Path | None:
        return FILE if option.metavar == "FILE" else FOLDER
    if kind == float | None:
        return float
    return str if kind in (str | None, tuple[str, ...]) else kind


def _trust(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        from cxrfast.models.networks.factories import ANY, trusted  # torch

        ctx.with_resource(trusted(ANY))


TRUST_ARCH = click.option(
    "--trust-arch",
    is_flag=True,
    expose_value=False,
    callback=_trust,
    help="Import a network of one's own (package.module:factory) that a run names: this runs its code.",
)

runtime_options = configuration_options(config.Runtime, {"device", "engine", "threads"})
"""Options of every command that loads images."""


def configured(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options that are not defaults, as fields of TrainConfig and of Runtime."""
    training, runtime = (
        {
            name: options[name]
            for name, (_, _, default) in options_of(kind).items()
            if options.get(name, default) != default
        }
        for kind in (config.TrainConfig, config.Runtime)
    )
    return training, runtime
