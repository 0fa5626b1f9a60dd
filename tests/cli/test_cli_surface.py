"""The command line is a contract: to change it is to change `cli_surface.txt`, on purpose.

To accept one: python tests/cli/test_cli_surface.py > tests/cli_surface.txt
"""

from pathlib import Path

import click

from cxrfast.cli.main import cli

FLAGS = ("required", "multiple", "is_flag")


def commands(group: click.Group = cli, before: str = "") -> dict[str, click.Command]:
    """Every command by its full name, such as `bench load`."""
    found: dict[str, click.Command] = {}
    for name, command in sorted(group.commands.items()):
        found[before + name] = command
        if isinstance(command, click.Group):
            found |= commands(command, f"{before}{name} ")
    return found


def surface() -> str:
    """One line per command, argument and option."""
    lines = []
    for name, command in commands().items():
        lines.append(name)
        for parameter in sorted(command.params, key=lambda p: (p.param_type_name, p.name or "")):
            choices = getattr(parameter.type, "choices", None)
            kind = "|".join(map(str, choices)) if choices else parameter.type.name
            flags = [f.removeprefix("is_") for f in FLAGS if getattr(parameter, f, False)]
            names = "/".join(parameter.opts) if isinstance(parameter, click.Option) else parameter.name
            lines.append(" ".join(["   ", names or "", kind, *flags]))
    return "\n".join(lines) + "\n"


def test_the_command_line_is_what_was_agreed() -> None:
    assert surface() == (Path(__file__).parents[1] / "cli_surface.txt").read_text()


def test_every_command_and_option_has_help() -> None:
    for name, command in commands().items():
        assert command.help, name
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, (name, parameter.name)


if __name__ == "__main__":
    print(surface(), end="")
