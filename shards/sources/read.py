"""Read a source by its name, with its options, and check what it lists."""

import inspect
import os
import pkgutil
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cxrfast.errors import CxrfastError, ShardError
from cxrfast.shards.sources.any_table import table as any_table
from cxrfast.shards.sources.chexpert import chexpert
from cxrfast.shards.sources.mimic import mimic
from cxrfast.shards.sources.nih import nih
from cxrfast.shards.sources.source import Source, checked
from cxrfast.shards.storage import URL, Tree

SOURCES: dict[str, Callable[..., Source]] = {"mimic": mimic, "chexpert": chexpert, "nih": nih, "table": any_table}


def read_source(name: str, tree: Tree | Path | str, options: dict[str, Any] | None = None) -> Source:
    """The images that source `name` lists in `tree`: one of `SOURCES`, or a function named `package.module:function`.

    A function is imported and called, so the name must come from the user, never from a file. `options` are its keyword
    arguments. The result is checked: every row can go into a set. Raises ShardError
    for anything wrong with the tree, its tables or the options.
    """
    tree = tree if isinstance(tree, Tree) else Tree(tree)
    options = options or {}
    function = SOURCES.get(name) or _imported(name)
    _check_options(name, function, options)
    if not tree.is_dir(""):
        raise ShardError(f"the source {tree} does not exist or is not a folder: give --data DIR or set CXRFAST_DATA")
    if name in SOURCES:
        if wrong := [_flag(key) for key, value in options.items() if not _is_text(value)]:
            raise ShardError(f"{wrong[0]} of source {name} is neither text nor a list of texts")
        return checked(function(tree, **options), tree)
    try:
        listed = function(tree, **options)
    except CxrfastError:
        raise
    except Exception as error:  # a user's code may raise anything: report it with the line that raised
        frames = traceback.extract_tb(error.__traceback__)
        code = getattr(function, "__code__", None)
        at = ([f for f in frames if code and f.filename == code.co_filename] or frames)[-1]
        raise ShardError(
            f"source {name} failed at {at.filename}:{at.lineno}: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(listed, Source):
        raise ShardError(
            f"source {name} returned {type(listed).__name__}: it must return a cxrfast.shards.sources.Source"
        )
    return checked(listed, tree)


def as_stored(tree: Tree, options: dict[str, Any]) -> dict[str, Any]:
    """The options as a set keeps them, valid in any working folder: a table that is not in the tree but in the working folder
    (as a shell completes its name) is given by its path in the tree, or by its absolute path."""
    table = options.get("table")
    if not isinstance(table, str) or URL.match(table) or not os.path.isfile(table):
        return options
    path = os.path.abspath(table)
    if os.path.isabs(table) or (".." not in Path(table).parts and tree.exists(table)):
        return options
    inside = next((path.removeprefix(root) for root in tree.roots if path.startswith(root)), path)
    return {**options, "table": inside}


def _is_text(value: Any) -> bool:
    return (
        value is None
        or isinstance(value, str | bool)
        or (isinstance(value, list | tuple) and all(isinstance(entry, str) for entry in value))
    )


def _imported(name: str) -> Callable[..., Source]:
    """Import `package.module:function`."""
    if ":" not in name:
        raise ShardError(f"source {name!r} is unknown: use {', '.join(SOURCES)} or package.module:function")
    try:
        function = pkgutil.resolve_name(name)
    except Exception as error:  # importing runs a user's code
        raise ShardError(
            f"source {name} cannot be imported ({type(error).__name__}: {error}): install its package, or name its folder in "
            "PYTHONPATH"
        ) from error
    if not callable(function):
        raise ShardError(f"source {name} is {type(function).__name__}, not a function")
    return function


def _check_options(name: str, function: Callable[..., Source], options: dict[str, Any]) -> None:
    """Raise ShardError for an option that the source does not have, and for a required one that is missing."""
    kinds = inspect.Parameter
    try:
        taken = list(inspect.signature(function).parameters.values())[1:]
    except (TypeError, ValueError) as error:
        raise ShardError(f"the arguments of source {name} cannot be read ({error}): name a Python function") from error
    if any(p.kind is kinds.VAR_KEYWORD for p in taken):
        return
    names = [p.name for p in taken if p.kind in (kinds.KEYWORD_ONLY, kinds.POSITIONAL_OR_KEYWORD)]
    if unknown := [option for option in options if option not in names]:
        known = ", ".join(map(_flag, names)) or "none"
        raise ShardError(f"{_flag(unknown[0])} is not an option of source {name} (its options: {known})")
    if absent := [p.name for p in taken if p.default is kinds.empty and p.name in names and p.name not in options]:
        raise ShardError(f"source {name} needs {' and '.join(map(_flag, absent))}")


def with_defaults(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options of a source, with the defaults of those that were not given. Imports it: `name` must be the user's."""
    function = SOURCES.get(name) or _imported(name)
    defaults = {p.name: p.default for p in inspect.signature(function).parameters.values()}
    return {**{key: value for key, value in defaults.items() if value is not inspect.Parameter.empty}, **options}


def _flag(option: str) -> str:
    return "--" + option.replace("_", "-")
