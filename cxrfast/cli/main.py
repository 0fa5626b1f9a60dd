"""The command line: the group of all commands; errors become one line and an exit code.

Each command parses, calls one function and prints the result. Imports are inside the commands, so `cxrfast --help` is quick.
"""

import errno
import sys
from pathlib import Path
from typing import Any

import click

from cxrfast import __version__, log
from cxrfast.cli import analysis, app, bench, export, predict, shards, study, training
from cxrfast.cli import options as option
from cxrfast.cli.completion import add_completion
from cxrfast.cli.streams import prepare
from cxrfast.cli.terminal import fail, say, show
from cxrfast.errors import CxrfastError, is_disk_full, is_out_of_memory
from cxrfast.machine import let_threads_sleep


class Cli(click.Group):
    """Turns the errors of the project and of the file system into one message and exit code 2."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # not sorted by name

    def main(self, *args: Any, **options: Any) -> Any:
        prepare()
        try:
            return super().main(*args, **options)
        except OSError as error:
            if not is_disk_full(error):  # of help or version, which are printed outside `invoke`
                raise
            fail(in_words(error))

    def invoke(self, ctx: click.Context) -> Any:
        log.show()
        let_threads_sleep()
        try:
            return super().invoke(ctx)
        except CxrfastError as error:
            fail(str(error))
        except KeyboardInterrupt:
            say("cxrfast: interrupted; finished work is kept, run the same command to resume", err=True)
            sys.exit(130)
        except (RuntimeError, MemoryError, ImportError) as error:
            if not (is_out_of_memory(error) or "failed to map segment" in str(error)):  # loading a library
                raise
            words = (str(error).splitlines() or [type(error).__name__])[0]
            fail(f"memory ran out ({words}): use a smaller scale, or a machine or GPU with more free memory")
        except OSError as error:
            if error.filename is None and not is_disk_full(error):
                raise
            fail(in_words(error))


def in_words(error: OSError) -> str:
    if is_disk_full(error):
        return (
            f"no space or quota left ({error.filename or 'while writing'}): finished work is kept; make room and run the same "
            "command again"
        )
    if error.errno == errno.EROFS and error.filename:
        folder = Path(error.filename).parent
        return f"{folder} is on a read-only file system, and this command writes there: run it on a copy that you can write to"
    return f"{error.filename}: {error.strerror}" if error.filename else str(error)


SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 110, "show_default": True}


@click.group(cls=Cli, context_settings=SETTINGS)
@click.version_option(__version__, prog_name="cxrfast")
def cli() -> None:
    """Train chest X-ray classifiers at full resolution without waiting for I/O."""


@click.command()
@option.flag("--deep", "Also check pixels, gradients, streams and memory: about a minute.")
@click.option("--shards", type=option.FOLDER, help="With --deep: shard set. [default: freshly drawn phantoms]")
@click.option("--scale", type=option.COUNT, help="With --deep: side, px. [default: the smallest of --shards]")
def doctor(deep: bool, shards: Path | None, scale: int | None) -> None:
    """Show what this machine has, what it lacks, and what to do about it."""
    from cxrfast.doctor.inventory import examine, inventory_table

    if not deep and (shards or scale):
        fail("--shards and --scale need --deep")
    items = examine()
    show(inventory_table(items))
    problems = []
    if any(item.is_problem for item in items):
        problems.append("this machine lacks something that cxrfast needs: see the advice above")
    if deep:
        from cxrfast.doctor.checkup import checkup, failed

        problems.append(failed(checkup(shards, scale)))
    if any(problems):
        fail("; ".join(filter(None, problems)))


IN_ORDER = (
    *(shards.synth, shards.shard, shards.relabel, shards.describe, shards.verify, shards.stage),
    *(training.train, training.fetch_weights, predict.predict),
    *(analysis.evaluate, analysis.ensemble, analysis.thresholds, analysis.table, analysis.erf, analysis.gradcam),
    *(analysis.report, export.export, app.app),
    *(training.status, study.study, bench.bench, study.demo, doctor),
)
"""All commands, in the order in which a study needs them."""

for command in IN_ORDER:
    cli.add_command(command)
add_completion(cli)
