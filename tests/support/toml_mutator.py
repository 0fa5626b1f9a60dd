"""TOML files for --config and --slurm that somebody hostile wrote, one per seed, and the commands that read them.

As a script, `python toml_mutator.py SET FIRST LAST` tries the seeds from FIRST up to LAST and prints, for each, its file and what
the command made of it. It ends with a traceback where a command does, or by SIGALRM where one hangs.
"""

import json
import os
import sys
from pathlib import Path
from random import Random

from damage import put
from hostile import outcome, try_seeds
from set_mutator import NUMBERS, TEXTS, change_bytes

from cxrfast.cli.main import cli

VALUES = [
    *(str(n) for n in NUMBERS if abs(n) < 2**64),
    *(json.dumps(text) for text in TEXTS),
    *(
        "nan",
        "-nan",
        "inf",
        "-inf",
        "true",
        "false",
        "0x10",
        "1_0",
        "1e400",
        "9" * 5000,
        "0x" + "f" * 5000,
        "1.5",
        "[]",
        "[[]]",
        "{}",
        "[1, 2]",
        '["a", 1]',
    ),
    *(
        "1979-05-27",
        "07:32:00",
        "1979-05-27T07:32:00Z",
        "{a = 1}",
        "[{a = 1}]",
        "''",
        "'''a\nb'''",
        "[nan]",
        "[true]",
        "[" * 5000 + "]" * 5000,
    ),
]
RAW = [
    *(
        b"",
        b"\xff\xfe",
        b"\0",
        b"a = 1\0",
        b"\xef\xbb\xbfepochs = 1\n",
        "scale = 32\n".encode("utf-16"),
        b"[" * 100_000,
        b"a" * 2_000_000,
    ),
    *(
        b"a.b.c.d.e = 1",
        b"a." * 20_000 + b"b = 1",
        b"[a]\n[a]",
        b"x = 1\nx = 2",
        b"= 1",
        b"# only\r# returns\r",
        b'"" = 1',
        b"[[slurm]]\n",
    ),
    *(
        b"slurm = 5",
        b"[slurm]\n[slurm.x]\n",
        b"[other]\n",
        b"[slurm]\ntime = '1:00'",
        b"k = '\xed\xa0\x80'",
        b"epochs = 1 # \x1b[31m\n",
    ),
]
SLURM = [
    "account",
    "partition",
    "time",
    "nodes",
    "gpus",
    "cpus",
    "memory",
    "extra",
    "setup",
    "x",
    '""',
    '"\\u001b[31m"',
    '"a\\nb"',
]
TRAIN = [
    "--device=cpu",
    "--arch=shufflenet_v2_x0_5",
    "--weights=none",
    "--limit=8",
    "--global-batch=8",
    "--micro-batch=8",
]
KINDS = ["pipe", "folder", "absent", "/dev/zero", "/dev/null", "/etc/passwd", "loop", "huge"]


def toml(random: Random, is_slurm: bool) -> bytes:
    """The content of a file."""
    if random.random() < 0.2:
        return random.choice(RAW)
    names = SLURM if is_slurm else [o.removeprefix("--") for p in cli.commands["train"].params for o in p.opts]
    names = [
        name.replace("-", "_") if random.random() < 0.5 else name for name in names if name not in ("runs", "shards")
    ]
    lines = [f"{name} = {random.choice(VALUES)}" for name in random.sample(names, random.choice([1, 1, 2, 3]))]
    if is_slurm and random.random() < 0.9:
        lines.insert(0, "[slurm]")
    if random.random() < 0.1:
        lines.append(random.choice(["[table]", "x = 1", "[[config]]", '"\\u202e" = 1', '"../x" = "y"']))
    data = "\n".join(lines).encode(errors="surrogatepass")
    return change_bytes(data, random) if random.random() < 0.1 else data


def attempt(shards: Path, seed: int, aside: Path) -> str:
    """What a command made of the file of a seed."""
    random = Random(seed)
    here = aside / "two" / "down"  # ../.. leads nowhere else
    here.mkdir(parents=True)
    os.chdir(here)
    path, is_slurm = here / "options.toml", random.random() < 0.4
    if random.random() < 0.1:
        done = random.choice(KINDS)
        put(done, path)
    else:
        path.write_bytes(toml(random, is_slurm))
        done = path.read_bytes()[:300].decode(errors="replace")
    words = [
        "train",
        "--shards",
        shards,
        "--runs=runs",
        "--scale=32",
        *TRAIN,
        "--epochs=1",
        "--name=x",
        f"--config={path}",
    ]
    if random.random() < 0.7:  # a later error ends it before it trains
        words = [w for w in words if not str(w).startswith(("--epochs", "--name", "--scale"))] + ["--scale=48"]
    if is_slurm:
        words = ["study", shards, "runs", "--scale=32", "--fold=0", "--rate=32=1", *TRAIN, f"--slurm={path}"]
        words.append(random.choice(["--dry-run", "--sbatch=jobs"]))
    print(f"seed {seed}: {words[0]} {done!r}", flush=True)
    found = outcome(words, aside)
    assert not list(aside.rglob("pwned"))
    return found[:300]


def main() -> None:
    shards, first, last = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    before = {path: path.stat().st_mtime_ns for path in shards.rglob("*")}
    try_seeds(first, last, lambda seed, aside: attempt(shards, seed, aside))
    assert before == {path: path.stat().st_mtime_ns for path in shards.rglob("*")}, "the set changed"


if __name__ == "__main__":
    main()
