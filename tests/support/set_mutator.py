"""Shard sets that were changed by somebody hostile, one per seed, and the commands that must survive them.

As a script, `python set_mutator.py SET TREE FIRST LAST` tries the seeds from FIRST up to LAST and prints, for each, its damage
and what each command made of it. It ends with a traceback where a command does, or by SIGALRM where one hangs.
"""

import csv
import io
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from click.testing import CliRunner
from damage import put, sign

from cxrfast.cli.main import cli
from cxrfast.errors import CxrfastError
from cxrfast.files import sha256
from cxrfast.pipelines.reader import Reader
from cxrfast.shards.format import lock
from cxrfast.shards.format.codec import decode_member
from cxrfast.shards.format.info import COPY
from cxrfast.shards.shard_set import ShardSet
from cxrfast.training.setup import make_config, select_rows

SECONDS = 120
"""A command that takes longer hangs."""

TEXTS = [
    "",
    "x",
    "../../x",
    "/etc/passwd",
    "\0",
    "\x1b[31m",
    "a\nb",
    "\u202e",
    "=cmd|'/C calc'!A0",
    "x" * 5000,
    "nan",
    "0x1",
]
NUMBERS = [
    0,
    -1,
    1,
    2,
    7,
    2**31,
    2**32,
    2**53 + 1,
    2**63 - 1,
    2**63,
    2**64,
    -(2**63),
    -(2**70),
    10**30,
    1.5,
    -0.0,
    1e308,
]
VALUES: list[Any] = [None, True, [], {}, [[]], [None], {"a": 1}, *TEXTS, *NUMBERS]
RAW = [
    "NaN",
    "Infinity",
    "1e400",
    "-1e999",
    "9" * 5000,
    "[" * 100_000,
    '{"a":' * 50_000,
    '"\\ud800"',
    '"\\u0000"',
    "0x10",
    "'",
]
"""Text in place of a JSON value, most of it no JSON."""


# What is changed


def change_json(value: Any, random: Random) -> str:
    """The JSON of `value` with one value in it replaced, removed or doubled."""
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in node.keys() if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list) and node[key]:
                walk(node[key])

    walk(value)
    tops = [place for place in places if place[0] is value]
    node, key = random.choice(random.choice([places, tops]))
    how = random.randrange(8)
    if how == 0:
        del node[key]
    elif how == 1 and isinstance(node, dict):
        node[random.choice(TEXTS)] = node.pop(key)
    elif how == 2 and isinstance(node, list):
        node.insert(random.randrange(len(node) + 1), node[key])
    elif how == 3:
        node[key] = "REPLACED"
        return json.dumps(value).replace('"REPLACED"', random.choice(RAW), 1)
    elif how == 4 and isinstance(node, dict):
        node["REPLACED"] = random.choice(VALUES)
        return json.dumps(value).replace('"REPLACED"', json.dumps(str(key)), 1)  # the same key twice
    elif isinstance(node[key], int) and random.random() < 0.5:
        node[key] += random.choice([-1, 1, 64, 2**40])
    else:
        node[key] = random.choice(VALUES)
    return json.dumps(value)


def change_bytes(data: bytes, random: Random) -> bytes:
    """One of: bits changed, cut, pieces removed, repeated or moved, nothing left, random bytes."""
    at, n = random.randrange(len(data) + 1), random.randrange(1, 100)
    changed = bytearray(data)
    for place in random.sample(range(len(data)), min(len(data), n if random.random() < 0.3 else 2)):
        changed[place] ^= 1 << random.randrange(8)
    kinds = [bytes(changed), data[:at], data[:at] + data[at + n :], data[:at] + data[at : at + n] * 3 + data[at + n :]]
    return random.choice([*kinds, data + random.randbytes(n), random.randbytes(n), b"", b"\xff\xfe" + data])


def change_description(folder: Path, random: Random) -> str:
    """set.json, its copy in rows.parquet, or both."""
    text = change_json(json.loads((folder / "set.json").read_text()), random)
    where = random.choice(["both", "set.json", "rows.parquet"])
    if where != "rows.parquet":
        (folder / "set.json").write_text(text)
    if where != "set.json":
        path = folder / "rows.parquet"
        pq.write_table(pq.read_table(path).replace_schema_metadata({COPY: text.encode()}), path)
    return f"{where} {text if len(text) < 3000 else text[:100]}"


def change_manifest(folder: Path, random: Random) -> str:
    path = random.choice(sorted(folder.glob("*/*.json")))
    path.write_text(change_json(json.loads(path.read_text()), random))
    return str(path.relative_to(folder))


def change_rows(folder: Path, random: Random) -> str:
    """A column, a value, the lines or the types of rows.parquet."""
    path = folder / "rows.parquet"
    table = pq.read_table(path)
    description = table.schema.metadata
    frame = table.to_pandas().astype(object)
    name = random.choice(list(frame.columns))
    how = random.choice(["drop", "lines", "order", "twice", "rename", "value", "value", "all", "type"])
    if how == "drop":
        frame = frame.drop(columns=name)
    elif how == "lines":
        frame = random.choice([frame.iloc[:0], frame.iloc[:-1], pd.concat([frame, frame]), frame.iloc[1:]])
    elif how == "order":
        frame = frame.iloc[::-1]
    elif how == "rename":
        frame = frame.rename(columns={name: random.choice(TEXTS)})
    elif how in ("value", "all"):
        value = random.choice([v for v in VALUES if v is None or isinstance(v, str | int | float)])
        frame.loc[random.randrange(len(frame)) if how == "value" else slice(None), name] = value
    columns = {}
    for column in frame.columns:
        kind = table.schema.field(column).type if column in table.column_names else pa.string()
        kinds = [kind, pa.string(), pa.int64(), pa.float64(), pa.large_string(), pa.binary()]
        for wanted in random.sample(kinds, len(kinds)) if how == "type" and column == name else kinds:
            try:
                columns[column] = pa.array(frame[column], wanted)
                break
            except (pa.ArrowException, TypeError, ValueError, OverflowError):
                continue
        else:
            columns[column] = pa.nulls(len(frame))
    made = pa.table(list(columns.values()), names=list(columns))
    if how == "twice":
        made = made.append_column(name, made[name])
    pq.write_table(made.replace_schema_metadata(description), path)
    return f"rows.parquet {how} {name!r:.80}"


def change_index(folder: Path, random: Random) -> str:
    path = random.choice(sorted(folder.glob("*/*.idx")))
    lines = [line.split(" ") for line in path.read_text().splitlines()]
    line = random.choice(lines)
    at = random.randrange(len(line))
    values = [*map(str, NUMBERS), *TEXTS, "9" * 5000, "٣", "1_0", "+1", "000000001.jpg", "1" * 12]
    how = random.randrange(4)
    if how == 0:
        line[at] = random.choice(values)
    elif how == 1:
        line[1] = line[min(2, len(line) - 1)] = random.choice(values)
    elif how == 2:
        lines.insert(random.randrange(len(lines)), line)
        lines[0][1] = str(len(lines) - 1)
    else:
        del line[at]
    path.write_text("\n".join(" ".join(line) for line in lines) + "\n")
    return str(path.relative_to(folder))


HEADER = {"name": (0, 100), "mode": (100, 108), "size": (124, 136), "checksum": (148, 156), "type": (156, 157)}
FIELDS = [
    b"",
    b"\0",
    b"-1",
    b"77777777777",
    b"\x80" + b"\xff" * 11,
    b"\xff" * 12,
    b"../../x",
    b"/etc/passwd",
    b"9" * 12,
]
"""Values of fields in a tar's header, numbers in octal or in base 256."""


def change_tar(folder: Path, random: Random) -> str:
    """A header or the content of a member; sometimes the manifest is made to agree."""
    path = random.choice(sorted(folder.glob("*/*.tar")))
    data = bytearray(path.read_bytes())
    starts = [n for n in range(0, len(data), 512) if data[n + 257 : n + 262] == b"ustar"]
    at = random.choice(starts)
    field = random.choice(["bytes", "json", *HEADER, "type"])
    if field == "bytes":
        data = bytearray(change_bytes(bytes(data), random))
    elif field == "json":
        start = data.index(b'{"row"')
        end = data.index(b"}", data.index(b"}", start) + 1) + 1
        text = change_json(json.loads(data[start:end]), random).encode()
        data[start:end] = text[: end - start].ljust(end - start)
    else:
        first, last = HEADER[field]
        value = random.choice([b"x", b"g", b"L", b"S", b"1", b"2", b"6", b"5"] if field == "type" else FIELDS)
        data[at + first : at + last] = value[: last - first].ljust(last - first, b"\0")
        if field != "checksum":
            data[at + 148 : at + 156] = b" " * 8
            data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    path.write_bytes(data)
    manifest = path.with_suffix(".json")
    if random.random() < 0.7:
        value = {**json.loads(manifest.read_text()), "sha256": sha256(path), "bytes": len(data)}
        manifest.write_text(json.dumps(value) + "\n")
    return f"{path.relative_to(folder)} {field}"


def change_quarantine(folder: Path, random: Random) -> str:
    path = folder / "quarantine.csv"
    lines = list(csv.reader(path.open()))
    line = random.choice(lines)
    line[random.randrange(3)] = random.choice([*map(str, NUMBERS), *TEXTS, "9" * 5000, "y" * 200_000])
    if random.random() < 0.3:
        line.pop()
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    path.write_text(text.getvalue())
    for gone in folder.glob("*/*.json") if random.random() < 0.3 else ():  # then quarantine.csv alone counts
        gone.unlink()
    return path.name


def change_sums(folder: Path, random: Random) -> str:
    path = folder / "SHA256SUMS"
    lines = path.read_text().splitlines()
    at = random.randrange(len(lines))
    names = [
        "../../x",
        "/etc/passwd",
        "32/../../x.tar",
        "9" * 5000 + "/000000.tar",
        "16/" + "9" * 5000 + ".tar",
        "16/0.tar",
    ]
    names += ["16/000000.tar\0", "16/000000.tar/x", "99999/000000.json", "16/999999999.json", "set.json", "lease.lock"]
    how = random.randrange(3)
    if how == 0:
        lines[at] = f"{'0' * 64}  {random.choice(names)}"
    elif how == 1:
        lines.append(f"{'f' * 64}  {random.choice(names)}")
        lines.sort(key=lambda line: line[66:])
    else:
        lines[at] = random.choice(TEXTS)
    path.write_text("\n".join(lines) + "\n")
    return path.name


def change_kind(folder: Path, random: Random) -> str:
    """Another thing in place of a file or folder, or one more."""
    there = [str(path.relative_to(folder)) for path in folder.rglob("*")]
    more = [
        "lease.lock",
        "repair.tmp",
        "16/000009.json",
        "SHA256SUMS.unfinished",
        "SHA256SUMS.relabelling",
        "set.json.x-1-2.tmp",
    ]
    name = random.choice([*there, *more])
    path = folder / name
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    kind = random.choice(
        ["pipe", "folder", "absent", "empty", "/etc/passwd", "/dev/zero", "/dev/null", "loop", "outside"]
    )
    put(kind, path, outside=folder.parent / "victim")
    return f"{name} becomes {kind}"


def change_raw(folder: Path, random: Random) -> str:
    path = random.choice([path for path in sorted(folder.rglob("*")) if path.is_file()])
    path.write_bytes(change_bytes(path.read_bytes(), random))
    return f"{path.relative_to(folder)} bytes"


CHANGES: list[Callable[[Path, Random], str]] = [
    *(change_description, change_description, change_manifest, change_manifest, change_rows, change_rows),
    *(change_index, change_tar, change_tar, change_quarantine, change_sums, change_kind, change_raw),
]


def mutate(folder: Path, seed: int) -> str:
    """Change a set, and in half of the cases make all hashes agree. Returns what was done."""
    random = Random(seed)
    change = random.choice(CHANGES)
    done = change(folder, random)
    if random.random() < 0.5 and change not in (change_sums, change_kind):
        sign(folder)
        return f"{done} (signed)"
    return done


# What must survive it


def open_for_training(folder: Path) -> None:
    """What a training does before its first batch, and the pixels of all rows. Raises CxrfastError."""
    config = make_config(folder, 32, device="cpu", global_batch=4, micro_batch=4)
    with Reader(folder, 32) as reader:
        select_rows(ShardSet(folder).rows(), config, reader.rows)
        for row in reader.rows.tolist():
            decode_member(bytes(reader.read(row)), reader.info.codec)


def command(name: str, folder: Path, tree: Path, aside: Path) -> list[Any]:
    """Words of a command on a set."""
    table = tree / "mimic-cxr-2.0.0-negbio.csv.gz"
    return {
        "verify": ["verify", folder],
        "deep": ["verify", folder, "--deep"],
        "repair": ["verify", folder, "--repair", "--data", "", "--workers", 1],
        "rebuild": ["verify", folder, "--repair", "--data", tree, "--workers", 1],
        "describe": ["describe", folder, "--out", aside / "description"],
        "stage": ["stage", folder, aside / "copy"],
        "unstage": ["stage", aside / "whole", folder],
        "relabel": ["relabel", folder, table],
        "shard": ["shard", "--data", tree, "--out", folder, "--scale", 8, "--workers", 1],
    }[name]


OFTEN = ("verify", "deep", "repair", "describe", "stage", "relabel")
SELDOM = ("rebuild", "shard", "unstage")
"""These start processes, or copy a set."""


def outcome(name: str, folder: Path, tree: Path, aside: Path) -> str:
    """`right`, or `refused` and the last line of the message. Raises what the command raised if that is anything else."""
    signal.alarm(SECONDS)
    try:
        if name == "train":
            try:
                open_for_training(folder)
            except (CxrfastError, OSError) as error:  # the command line shows both as one line
                if isinstance(error, OSError) and not error.filename:
                    raise
                return f"refused {error}"
            return "right"
        done = CliRunner().invoke(cli, [str(word) for word in command(name, folder, tree, aside)])
    finally:
        signal.alarm(0)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code in (0, 2), (done.exit_code, done.output)
    assert "Traceback" not in done.output
    assert "\x1b" not in done.output, "an escape sequence reached the terminal"
    assert done.exit_code == 0 or done.output.strip(), "refused without a word"
    return "right" if done.exit_code == 0 else f"refused {(done.output.strip().splitlines() or [''])[-1]}"


def attempt(whole: Path, tree: Path, seed: int, aside: Path) -> dict[str, str]:
    """{command: outcome} for the set of a seed."""
    random = Random(f"commands of {seed}")
    folder, victim = aside / "set", aside / "victim"
    shutil.copytree(whole, folder)
    (aside / "whole").symlink_to(whole)
    victim.write_text("precious")
    done = mutate(folder, seed)
    print(f"seed {seed}: {done!r:.300}", flush=True)
    found = {}
    names = [*random.sample(OFTEN, 2), *([random.choice(SELDOM)] if random.random() < 0.03 else [])]
    for name in names:
        changed = aside / name
        os.rename(folder, changed)
        found[name] = outcome(name, changed, tree, aside)
        os.rename(changed, folder)
        if found[name] == "right" and name in ("repair", "rebuild") and not done.endswith("(signed)"):
            assert (then := outcome("deep", folder, tree, aside)) == "right", f"{name} repaired it, but {then}"
        if found[name] == "right" and name == "deep":
            assert (then := outcome("train", folder, tree, aside)) == "right", f"{name} called it whole, but {then}"
    found["train"] = outcome("train", folder, tree, aside)
    assert victim.read_text() == "precious"
    assert sorted(path.name for path in aside.iterdir() if path.name not in ("copy", "description")) == [
        "set",
        "victim",
        "whole",
    ]
    return found


def main() -> None:
    whole, tree, first, last = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    lock.BEAT, lock.WATCH = 0.05, 0.2  # a lease in a hostile set names a holder that never lived
    for seed in range(first, last):
        with tempfile.TemporaryDirectory() as aside:
            for name, what in attempt(whole, tree, seed, Path(aside)).items():
                print(f"{name} {what}"[:400], flush=True)
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)


if __name__ == "__main__":
    main()
