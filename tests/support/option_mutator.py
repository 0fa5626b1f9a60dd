"""Every option of every command with a hostile value, one per seed.

As a script, `python option_mutator.py SET RUN FIRST LAST` tries the seeds from FIRST up to LAST and prints, for each, its words
and what the command made of them. It ends with a traceback where a command does, or by SIGALRM where one hangs.
"""

import os
import shutil
import sys
from pathlib import Path
from random import Random

import click
import cv2
import numpy as np
from hostile import limit_memory, outcome, try_seeds

from cxrfast.cli.main import cli

NUMBERS = [
    *("nan", "inf", "-inf", "NaN", "1e400", "-1e-400", "1e308", "-1", "0", "-0", "1.5", "0x10", "1_0", "+3", "٣", "²"),
    *(str(n) for n in (2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30)),
    *("9" * 5000, "", " ", " 1", "1 ", "1\n", "x", "1,2", "--", "None", "auto"),
]
TEXTS = [
    *(
        "",
        " ",
        "x",
        ".",
        "..",
        "../../x",
        "/dev/null",
        "/dev/zero",
        "/dev/full",
        "/proc/self/mem",
        "/etc/passwd",
        "-",
        "--",
    ),
    *(
        "\x1b[31mred",
        "a\nb",
        "\u202e",
        "\udcff",
        "=1+1",
        "$(touch pwned)",
        "`touch pwned`",
        "; touch pwned",
        "%s",
        "{0}",
        "*",
        "~",
    ),
    *("x" * 300, "x" * 100_000, "a/b", "a\\b", "http://127.0.0.1:1/x", "file:///etc/passwd", "nan", "1e400"),
    *(
        "[bold]x[/nope]",
        "Edema=",
        "=Edema",
        "=",
        "Edema=u_ones=",
        "1/0",
        "0/1",
        "64x",
        "x64",
        "0x0",
        "-1x1",
        "1=1",
        "1=nan",
        "os:getcwd",
    ),
    *(
        "os.path",
        "builtins:exec",
        "00:00:00",
        "99999999999999999999:00:00",
        "-1:00",
        "1-00:00:00",
        "nan:nan:nan",
        "cuda:99",
        "cuda:x",
    ),
]
SKIPPED = {("", "--version"), ("", "--help")}


def commands() -> dict[str, click.Command]:
    found = {}
    for name, command in cli.commands.items():
        found[name] = command
        if isinstance(command, click.Group):
            found |= {f"{name} {inner}": one for inner, one in command.commands.items()}
    return found


def base(name: str, folder: Path) -> list[str]:
    """Arguments with which a command is quick; options given a second time win."""
    shards, run, table = folder / "set", folder / "runs" / "small" / "fold-0", folder / "labels.csv"
    small = [
        "--arch=shufflenet_v2_x0_5",
        "--weights=none",
        "--epochs=1",
        "--limit=8",
        "--global-batch=8",
        "--micro-batch=8",
    ]
    quick = ["--out=out", "--seconds=0.1", "--rounds=1", "--scale=32"]
    return {
        "synth": ["tree", "--images=2", "--size=64", "--workers=1"],
        "shard": ["--data=tree", "--out=new", "--scale=16", "--workers=1", "--dry-run"],
        "relabel": [str(shards), str(table)],
        "describe": [str(shards), "--out=out"],
        "verify": [str(shards)],
        "stage": [str(shards), "copy"],
        "train": ["--shards", str(shards), "--runs=new", "--scale=32", "--device=cpu", *small],
        "fetch-weights": ["--arch=none"],
        "predict": [str(run), f"--shards={shards}", "--device=cpu"],
        "evaluate": ["runs"],
        "ensemble": ["runs"],
        "thresholds": ["runs"],
        "table": ["runs"],
        "export": ["runs", "model", f"--shards={shards}"],
        "app": ["nothing", "--port=0"],
        "erf": [str(run), "--images=1", f"--shards={shards}", "--device=cpu"],
        "gradcam": [str(run), "--label=Cardiomegaly", "--images=1", f"--shards={shards}", "--device=cpu"],
        "report": ["nothing"],
        "status": ["runs"],
        "study": [str(shards), "new", "--dry-run", "--device=cpu", *small[:3], "--scale=32", "--fold=0", "--rate=32=1"],
        "bench": ["--nothing"],
        "bench step": [*quick, "--micro-batch=1", "--arch=none"],
        "bench ladder": ["--scale=32", "--only=nothing", "--out=out"],
        "bench shard": ["--data=nothing", "--scale=32", "--out=out"],
        "bench load": [*quick[:3], "--shards=nothing", "--scale=32"],
        "bench curriculum": ["--shards=nothing", "--scale=64", "--from-scale=32", "--out=out"],
        "demo": ["--nothing"],
        "doctor": ["--nothing"],
    }[name]


def words_of(seed: int, folder: Path) -> list[str]:
    """A command with one of its options or arguments replaced by a hostile value."""
    random = Random(seed)
    known = commands()
    places = [(name, param) for name in known for param in known[name].params]
    name, param = Random(0).sample(places, len(places))[seed % len(places)]  # few seeds try many commands
    is_number = isinstance(param.type, click.types.IntParamType | click.types.FloatParamType)
    value = random.choice(NUMBERS if is_number and random.random() < 0.9 else TEXTS + NUMBERS)
    words = base(name, folder)
    if name == "predict" and random.random() < 0.5:
        words.append("films/film.png")
    if isinstance(param, click.Argument):
        at = [one for one in known[name].params if isinstance(one, click.Argument)].index(param)
        words[at] = value
    elif getattr(param, "is_flag", False):
        words.append(random.choice(param.opts + param.secondary_opts))
    else:
        words.append(f"{random.choice(param.opts)}={value}")
    return [*name.split(), *words]


def attempt(whole: Path, run: Path, seed: int, aside: Path) -> str:
    """What a command made of the words of a seed."""
    here = aside / "two" / "down"  # ../.. leads nowhere else
    shutil.copytree(whole, here / "set")
    shutil.copytree(run, here / "runs" / "small" / "fold-0")
    (here / "labels.csv").write_text("image_id,Cardiomegaly\n")
    (here / "films").mkdir()
    cv2.imwrite(str(here / "films" / "film.png"), np.arange(64 * 64, dtype=np.uint8).reshape(64, 64))
    os.chdir(here)
    words = words_of(seed, here)
    print(f"seed {seed}: {words!r:.600}", flush=True)
    found = outcome(words, aside)
    assert not list(aside.rglob("pwned"))
    return found


def main() -> None:
    whole, run, first, last = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    limit_memory(24)
    try_seeds(first, last, lambda seed, aside: attempt(whole, run, seed, aside)[:300])


if __name__ == "__main__":
    main()
