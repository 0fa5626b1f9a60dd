"""Tab in a real, interactive bash: commands, options, choices, words and paths; quick, and nothing else is printed."""

import os
import pty
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from commands import run

from cxrfast.cli.completion import WORDS
from cxrfast.cli.main import cli
from cxrfast.config import TrainConfig

BASH = shutil.which("bash")
PROMPT = "READY> "

pytestmark = pytest.mark.skipif(BASH is None, reason="there is no bash")


class Shell:
    """An interactive bash on a terminal of its own, in a folder, with completion switched on as the documentation says."""

    def __init__(self, folder: Path) -> None:
        tools = folder.parent / "tools"
        tools.mkdir()
        script = tools / "cxrfast"
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m cxrfast "$@"\n')
        script.chmod(0o755)
        path = f"{tools}{os.pathsep}{os.environ['PATH']}"
        self.source = run(script, _CXRFAST_COMPLETE="bash_source", PATH=path).stdout
        (tools / "complete.bash").write_text(self.source)
        (tools / "rc").write_text(
            f"PS1='{PROMPT}'\nbind 'set bell-style none'\nbind 'set enable-bracketed-paste off'\n"
            f"bind 'set show-all-if-ambiguous on'\nbind 'set page-completions off'\nsource {tools}/complete.bash\n"
            """bind -x '"\\C-o": READLINE_LINE=; printf "<<>>"'\nbind -x '"\\C-g": printf "[[%s]]" "$READLINE_LINE"'\n"""
        )
        self.terminal, other = pty.openpty()
        self.process = subprocess.Popen(
            [str(BASH), "--noprofile", "--rcfile", str(tools / "rc"), "-i"],
            **{name: other for name in ("stdin", "stdout", "stderr")},
            cwd=folder,
            env={**os.environ, "PATH": path, "TERM": "dumb", "COLUMNS": "1000"},
            start_new_session=True,
        )
        os.close(other)
        self.read(PROMPT)

    def read(self, until: str, seconds: float = 60.0) -> str:
        """What the terminal shows, up to `until`."""
        found, start = "", time.monotonic()
        while until not in found:
            assert time.monotonic() - start < seconds, f"no {until!r} within {seconds} s: {found!r}"
            if select.select([self.terminal], [], [], 0.1)[0]:
                found += os.read(self.terminal, 65536).decode(errors="replace")
        return found

    def complete(self, words: str) -> tuple[str, str]:
        """The line after Tab was pressed behind `words`; and all that the terminal showed, without echoes of the line."""
        os.write(self.terminal, f"\x0f{words}\t\a".encode())  # Ctrl-O, words, Tab, Ctrl-G
        shown = self.read("]]").replace("\r", "").split("<<>>")[1].split("]]")[0]
        more, line = shown.split("[[")
        for echo in (PROMPT, line, words):
            more = more.replace(echo, "")
        return line, more


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    folder = tmp_path_factory.mktemp("completion") / "work"
    for name in ("runs/densenet121-256/fold-0", "films"):
        (folder / name).mkdir(parents=True)
    (folder / "films" / "chest.png").touch()
    shell = Shell(folder)
    yield shell
    shell.process.kill()
    shell.process.wait()
    os.close(shell.terminal)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("cxrfast thr", "cxrfast thresholds "),
        ("cxrfast bench lad", "cxrfast bench ladder "),
        ("cxrfast evaluate --fin", "cxrfast evaluate --finished-only "),
        ("cxrfast evaluate --part t", "cxrfast evaluate --part test "),
        ("cxrfast evaluate ru", "cxrfast evaluate runs/"),
        ("cxrfast train --precision b", "cxrfast train --precision bf16 "),
        ("cxrfast train --policy u_i", "cxrfast train --policy u_ignore "),
        ("cxrfast train --weights ima", "cxrfast train --weights imagenet "),
        ("cxrfast train --weights runs/dense", "cxrfast train --weights runs/densenet121-256/"),
        ("cxrfast train --config nowhere.toml --epo", "cxrfast train --config nowhere.toml --epochs "),
        ("cxrfast shard --source mi", "cxrfast shard --source mimic "),
        ("cxrfast shard --table films/ch", "cxrfast shard --table films/chest.png "),
        ("cxrfast predict runs/dense", "cxrfast predict runs/densenet121-256/"),
        ("cxrfast predict runs films/ch", "cxrfast predict runs films/chest.png "),
        ("cxrfast stage fil", "cxrfast stage films/"),
        ("cxrfast nothing-like-it --x", "cxrfast nothing-like-it --x"),
    ],
)
def test_tab_completes_the_one_thing_that_fits_and_prints_nothing_else(shell: Shell, words: str, line: str) -> None:
    found, more = shell.complete(words)
    assert found == line
    assert more.strip() == ""


def test_tab_lists_all_that_fits(shell: Shell) -> None:
    for words, every in (
        ("cxrfast ", list(cli.commands)),
        ("cxrfast thresholds --", ["--rule", "--finished-only", "--help"]),
        ("cxrfast thresholds --rule ", ["youden", "sensitivity=0.9", "specificity=0.9"]),
        ("cxrfast evaluate --part ", ["val", "test"]),
    ):
        assert shell.complete(words)[1].split() == every


def test_completion_loads_neither_torch_nor_pandas_and_writes_no_error(shell: Shell) -> None:
    code = (
        "import sys, atexit; atexit.register(lambda: print([m for m in ('torch', 'pandas', 'cv2') if m in sys.modules]));"
        "from cxrfast.cli.main import cli; cli(prog_name='cxrfast')"
    )
    asked = {"COMP_WORDS": "cxrfast predict --dev", "COMP_CWORD": "2", "_CXRFAST_COMPLETE": "bash_complete"}
    done = run(sys.executable, "-c", code, **asked)
    assert (done.stdout.split("\n")[:2], done.stderr) == (["plain,--device", "[]"], "")


@pytest.mark.parametrize("name", ["zsh", "fish"])
def test_other_shells_get_a_script(name: str) -> None:
    done = run(sys.executable, "-m", "cxrfast", _CXRFAST_COMPLETE=f"{name}_source")
    assert f"_CXRFAST_COMPLETE={name}_complete" in done.stdout
    assert done.stderr == ""


def test_words_that_are_completed_are_words_that_are_taken() -> None:
    for field in ("policy", "precision", "split", "weights"):
        for word in WORDS[field]:
            batches = {"global_batch": 8, "micro_batch": 8, "learning_rate": 1e-4}
            TrainConfig(**{"set_id": "a1", "scale": 256, "fold": 0, "labels": ("Edema",), **batches, field: word})
    shard = CliRunner().invoke(cli, ["shard", "--help"]).output
    assert all(word in shard for word in WORDS["source_name"])
