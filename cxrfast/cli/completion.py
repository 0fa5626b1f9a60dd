"""What Tab completes in a shell where a parameter takes any text: words that it knows, or paths.

click completes commands, options, choices and the parameters that are paths by type; the README says how to switch it on.
"""

from typing import Any

import click
from click.shell_completion import CompletionItem

from cxrfast.config.runtime import COMPILE_MODES
from cxrfast.config.training import PRECISIONS, SPLITS
from cxrfast.labels import POLICIES

WORDS: dict[str, tuple[str, ...]] = {
    "compile": COMPILE_MODES,
    "device": ("auto", "cpu", "cuda"),
    "policy": POLICIES,
    "precision": PRECISIONS,
    "source_name": ("mimic", "chexpert", "nih", "table"),
    "split": SPLITS,
    "weights": ("imagenet", "none"),
}
"""By parameter of a command."""

PATHS = {"data", "source", "table", "targets", "to", "weights"}
"""Parameters that take a path, and a URL, a pattern or a word too."""


class Text(click.types.StringParamType):
    """Any text, with `words` or paths for Tab."""

    def __init__(self, words: tuple[str, ...], is_path: bool) -> None:
        self.words, self.is_path = words, is_path

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        words = [CompletionItem(word) for word in self.words if word.startswith(incomplete)]
        return words or ([CompletionItem(incomplete, type="file")] if self.is_path else [])


def add_completion(command: click.Command) -> None:
    """Let Tab complete the text parameters of a command, or of all in a group."""
    if isinstance(command, click.Group):
        for one in command.commands.values():
            add_completion(one)
    for param in command.params:
        name: Any = "source_name" if param.opts == ["--source"] else param.name  # `stage` copies from a path
        if isinstance(param.type, click.types.StringParamType) and (name in WORDS or name in PATHS):
            param.type = Text(WORDS.get(name, ()), name in PATHS)
