"""Run folders that somebody hostile changed, one per seed, and the commands that must survive them.

As a script, `python run_mutator.py RUNS SET FIRST LAST` tries the seeds from FIRST up to LAST and prints, for each, its damage
and what each command made of it. It ends with a traceback where a command does, or by SIGALRM where one hangs.
"""

import json
import os
import pickle
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import cv2
import numpy as np
import torch
from damage import put
from hostile import outcome, try_seeds
from others import predict_other
from set_mutator import NUMBERS, RAW, TEXTS, VALUES, change_bytes, change_json, change_rows
from trainings import started, wait_for

from cxrfast.runs.run import Run

DONE, UNFINISHED = "mobilenet_v3_small-32/fold-0", "stopped/fold-0"
"""Runs of the folder that are changed."""

OTHER = "mobilenet_v3_small-64/fold-0"
"""A run that is done and is not changed, for ensembles."""

ELSEWHERE = "elsewhere"
"""Name of another set that the finished runs have predictions on."""

SECRET = b"\x89PNG\r\n\x1a\n precious and private"
"""Content of a file outside the runs, to which links lead."""

NAMES = [
    *(
        "x",
        "-rf",
        "--help",
        ".hidden",
        "a b",
        "a\nb",
        "\x1b[31mred",
        "\u202eevil",
        "<script>alert(1)</script>",
        "&amp;",
        "'\"`$(id)",
    ),
    *(
        "$x_1\\alpha$",
        "%s%n",
        "{0}",
        "=1+1",
        "|a|b|",
        "![x](http://127.0.0.1:9/x)",
        "x" * 250,
        "\udcff\udcfe",
        "[bold]x[/nope]",
        "fold-0",
    ),
]
"""Names of folders."""
FOLDS = [
    "fold-1",
    "fold-00",
    "fold--1",
    "fold-x",
    "fold-٣",
    "fold-" + "9" * 100,
    "fold-0 ",
    "fold-1.5",
    "fold-\n",
    "fold-[0]",
]


SMALL = [
    "--arch=mobilenet_v3_small",
    "--weights=none",
    "--limit=16",
    "--global-batch=8",
    "--micro-batch=4",
    "--precision=fp32",
]
TRAINED = ["--device=cpu", "--checkpoint-steps=1", *SMALL]


def make_runs(runs: Path, shards: Path) -> None:
    """Train the runs: two that are done and have everything that a run can have, and one that was stopped after an epoch."""
    for scale in (32, 64):
        train = ["train", "--shards", shards, "--runs", runs, f"--scale={scale}", "--epochs=1", *TRAINED]
        assert outcome(train, runs) == "right"
        run = runs / f"mobilenet_v3_small-{scale}" / "fold-0"
        for name in ("predict", "erf", "gradcam"):
            assert outcome(command(name, runs, shards, run), runs) == "right", name
        predict_other(Run.open(run), ELSEWHERE)
    cv2.imwrite(str(runs / "film.png"), np.arange(80 * 80, dtype=np.uint8).reshape(80, 80))
    stopped = runs / UNFINISHED
    with started(
        [sys.executable, "-m", "cxrfast", *map(str, command("train", runs, shards, stopped))], runs / "log"
    ) as process:
        wait_for(lambda: (stopped / "metrics.jsonl").exists(), process)
        process.terminate()
        process.wait()
    assert json.loads((stopped / "state.json").read_text())["state"] != "done", (runs / "log").read_text()
    (runs / "log").unlink()


# What is changed


def change_config(run: Path, random: Random) -> str:
    path = run / "config.json"
    whole = json.loads(path.read_text())
    if random.random() < 0.5:
        text = change_json(whole, random)
    elif random.random() < 0.5:
        key = random.choice(list(whole["config"]))
        whole["config"][key] = random.choice(VALUES)
        text = json.dumps(whole)
    else:
        inner = change_json(whole["config"], random)
        whole["config"] = "REPLACED"
        text = json.dumps(whole).replace('"REPLACED"', inner)
    path.write_text(text)
    return f"config.json {text if len(text) < 3000 else text[:100]}"


def change_state(run: Path, random: Random) -> str:
    path = run / "state.json"
    states = ["running", "preempted", "failed", "done", "", "x", None, 5]
    value = {
        **json.loads(path.read_text()),
        "state": random.choice(states),
        "error": random.choice(TEXTS),
        "job": random.choice(VALUES),
    }
    for key in ("time", "epoch", "epochs", "eta_seconds", "images_per_s"):
        if random.random() < 0.3:
            value[key] = random.choice(VALUES)
    text = change_json(value, random) if random.random() < 0.5 else json.dumps(value)
    path.write_text(text)
    return f"state.json {text[:300]}"


def change_record(run: Path, random: Random) -> str:
    """thresholds.json or reference.json: a value in it, another run's, or bytes."""
    path = run / random.choice(["thresholds.json", "reference.json"])
    how = random.choice(["json", "json", "key", "other", "bytes"])
    if how == "json":
        path.write_text(change_json(json.loads(path.read_text()), random), errors="surrogatepass")
    elif how == "key":
        value = json.loads(path.read_text())
        value[random.choice(list(value))] = random.choice(VALUES)
        path.write_text(json.dumps(value))
    elif how == "other":
        shutil.copy(run.parents[1] / OTHER / path.name, path)
    else:
        path.write_bytes(change_bytes(path.read_bytes(), random))
    return f"{path.name} {how}"


def change_external(run: Path, random: Random) -> str:
    """Predictions on another set: bytes of its table, a value or bytes of its arrays, another run's, or a part that is gone."""
    table, arrays = (run / "external" / f"{ELSEWHERE}{suffix}" for suffix in (".parquet", ".zarr"))
    how = random.choice(["bytes", "json", "chunk", "other table", "other arrays", "no table", "no arrays"])
    files = [path for path in sorted(arrays.rglob("*")) if path.is_file()]
    described = [path for path in files if path.name == "zarr.json"]
    path = random.choice({"json": described, "chunk": sorted({*files} - {*described})}.get(how, [table]))
    other = run.parents[1] / OTHER / "external"
    if how == "json":
        path.write_text(change_json(json.loads(path.read_text()), random))
    elif how in ("bytes", "chunk"):
        path.write_bytes(change_bytes(path.read_bytes(), random))
    elif how == "other table":
        shutil.copy(other / table.name, table)
    elif how == "no table":
        table.unlink()
    else:
        shutil.rmtree(arrays)
        if how == "other arrays":
            shutil.copytree(other / arrays.name, arrays)
    return f"external {path.name} {how}"


def change_metrics(run: Path, random: Random) -> str:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines()
    at, how = random.randrange(len(lines)), random.randrange(5)
    if how == 0:
        lines.insert(at, random.choice([*RAW, "", "null", "[]", "{}", '{"epoch": 0}']))
    elif how == 1:
        lines = random.choice([[], lines[::-1], lines * 2, lines[1:]])
    elif how == 2:
        line = json.loads(lines[at])
        line[random.choice(list(line))] = random.choice(VALUES)
        lines[at] = json.dumps(line)
    else:
        lines[at] = change_json(json.loads(lines[at]), random)
    path.write_text("\n".join(lines) + random.choice(["\n", ""]), errors="surrogatepass")
    return f"metrics.jsonl {lines[at][:100] if at < len(lines) else len(lines)}"


class Payload:
    """An object that runs a command where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.path}'",)


def tensors(random: Random) -> list[Any]:
    """Values in place of a tensor."""
    return [
        *(torch.zeros(0), torch.zeros(3), torch.zeros(1, 1, 1, 1), torch.full((14,), torch.nan), torch.tensor(1e38)),
        *(
            torch.zeros(14, dtype=torch.int64),
            torch.zeros(2, dtype=torch.complex64),
            torch.zeros(1).expand(2**40),
            {},
            [],
            None,
            "x",
            5,
        ),
        *random.sample(NUMBERS, 2),
    ]


def change_checkpoint(run: Path, random: Random) -> str:
    """last.pt with a value in it replaced, another pickle, or an object that runs a command."""
    path = run / "last.pt"
    how = random.choice(["value", "value", "value", "deep", "deep", "payload", "pickle", "bytes", "other"])
    if how == "bytes":
        path.write_bytes(change_bytes(path.read_bytes(), random))
        return "last.pt bytes"
    if how == "pickle":
        path.write_bytes(pickle.dumps(Payload(run / "pwned")))
        return "last.pt is a pickle"
    value = torch.load(path, weights_only=True)
    key = random.choice(list(value))
    place: Any = value
    if how == "deep":
        while isinstance(place[key], dict | list) and place[key]:
            place = place[key]
            key = random.choice(list(place) if isinstance(place, dict) else range(len(place)))
    made: Any = random.choice([*VALUES, *tensors(random)])
    if isinstance(made, torch.Tensor) and made.numel() > 2**30:
        made = torch.zeros(5)
    if how == "payload":
        made = Payload(run / "pwned")
    if random.random() < 0.2 and isinstance(place, dict):
        del place[key]
    else:
        place[key] = made
    torch.save(value if how != "other" else random.choice([[], {}, None, 5, "x", torch.zeros(3), list(value)]), path)
    return f"last.pt {how} {key!r:.60} {made!r:.60}"


def change_weights(run: Path, random: Random) -> str:
    """A field of the header of best.safetensors, its length, or bytes."""
    path = run / "best.safetensors"
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    how = random.choice(["header", "header", "header", "length", "bytes", "values"])
    if how == "header":
        header = change_json(json.loads(data[8 : 8 + length]), random).encode(errors="surrogatepass")
        data = struct.pack("<Q", len(header)) + header + data[8 + length :]
    elif how == "length":
        data = struct.pack("<Q", random.choice([0, 1, 7, length + 1, 2**31, 2**62, 2**64 - 1])) + data[8:]
    elif how == "values":
        values = np.frombuffer(data[8 + length :], np.uint8).copy()
        values[:: random.choice([1, 2, 4])] = random.choice([0x7F, 0xFF])  # most are NaN or infinite
        data = data[: 8 + length] + values.tobytes()
    else:
        data = change_bytes(data, random)
    path.write_bytes(data)
    return f"best.safetensors {how}"


ZARR2 = {
    "zarr_format": 2,
    "shape": [5],
    "chunks": [5],
    "dtype": "|O",
    "compressor": None,
    "fill_value": None,
    "order": "C",
    "filters": [{"id": "pickle"}],
}
"""Metadata of an array whose values are pickles, in the format before ours."""


def change_arrays(run: Path, random: Random) -> str:
    """Metadata or chunks of predictions.zarr or maps.zarr."""
    folder = run / random.choice(["predictions.zarr", "predictions.zarr", "maps.zarr"])
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    how = random.choice(["json", "json", "json", "chunk", "second", "more", "gone"])
    described = [path for path in files if path.name == "zarr.json"]
    path = random.choice(described)
    if how == "json":
        path.write_text(change_json(json.loads(path.read_text()), random))
    elif how == "chunk":
        path = random.choice([one for one in files if one not in described])
        path.write_bytes(change_bytes(path.read_bytes(), random))
    elif how == "second":  # the format before ours, with pickles in it
        arrays = [one.parent for one in described if '"array"' in one.read_text()]
        place = random.choice(arrays)
        (place / "zarr.json").unlink()
        (place / ".zarray").write_text(json.dumps(ZARR2))
        (place / "0").write_bytes(pickle.dumps(Payload(run / "pwned")))
        for parent in (place.parent, folder):
            (parent / ".zgroup").write_text('{"zarr_format": 2}')
            if random.random() < 0.5:
                (parent / "zarr.json").unlink(missing_ok=True)
        path = place
    elif how == "more":
        value = json.loads(path.read_text())
        codecs = [
            [{"name": "numcodecs.pickle"}],
            [{"name": "bytes"}, {"name": "evil"}],
            [{"name": "gzip", "configuration": {"level": 99}}],
        ]
        value |= {
            "codecs": random.choice(codecs),
            "shape": random.choice([[10**12], [-5], [2**63], [5, 5], [], value.get("shape", [])]),
        }
        path.write_text(json.dumps(value))
    else:
        shutil.rmtree(path.parent) if path.parent != folder else path.unlink()
    return f"{path.relative_to(run)} {how}"


def change_kind(run: Path, random: Random) -> str:
    """Another thing in place of a file or folder, or one more."""
    there = [str(path.relative_to(run)) for path in run.rglob("*")]
    more = [
        "gradcam-x.png",
        "lease.lock",
        "profile.json",
        "tensorboard",
        "../fold-1",
        "../../evaluation",
        "../../figures",
        "../../report.html",
    ]
    more += [
        "../../ensemble",
        "config.json.x-1-2.tmp",
        "last.pt.tmp",
        "gradcam-Cardiomegaly.png",
        "../fold-2/config.json",
        "erf.png",
    ]
    name = random.choice(
        [*there, *more, "config.json", "state.json", "metrics.jsonl", "rows.parquet", "last.pt", "best.safetensors"]
    )
    path = run / name
    path.parent.mkdir(exist_ok=True)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    kinds = [
        "pipe",
        "folder",
        "absent",
        "empty",
        "/etc/passwd",
        "/dev/zero",
        "/dev/null",
        "loop",
        "victim",
        "secret",
        "self",
        "huge",
    ]
    kind = random.choice(kinds)
    put(kind, path, victim=outer(run) / "victim", secret=outer(run) / "secret.png", self=run)
    return f"{name} becomes {kind}"


def outer(run: Path) -> Path:
    """Folder in which the folder of all runs is."""
    return run.parents[2]


def change_figure(run: Path, random: Random) -> str:
    """A Grad-CAM figure of a hostile name or content."""
    name = random.choice([*NAMES, *TEXTS[4:]])
    name = (
        "".join(c for c in name if c not in "/\0")[:200]
        .encode(errors="surrogateescape")[:200]
        .decode(errors="surrogateescape")
    )
    path = run / f"gradcam-{name}.png"
    contents = [
        b"",
        b"<script>alert(1)</script>",
        b"<svg onload=alert(1)>",
        b"\x89PNG\r\n\x1a\n" + b"x" * 100,
        SECRET,
        b"\xff\xd8\xff\xe0",
    ]
    path.write_bytes(random.choice(contents))
    return f"{path.name!r:.200} is new"


def change_name(run: Path, random: Random) -> str:
    """Name of the run's folder or of its parent."""
    if random.random() < 0.5:
        name = random.choice(FOLDS)
        run.rename(run.with_name(name))
    else:
        name = random.choice(NAMES).replace("/", "")
        run.parent.rename(run.parent.with_name(name))
    return f"folder {name!r:.100}"


def change_raw(run: Path, random: Random) -> str:
    path = random.choice([path for path in sorted(run.rglob("*")) if path.is_file()])
    path.write_bytes(change_bytes(path.read_bytes(), random))
    return f"{path.relative_to(run)} bytes"


def change_run_rows(run: Path, random: Random) -> str:
    return change_rows(run, random)


def change_copies(run: Path, random: Random) -> str:
    """A second run that is the first with another fold, scale or architecture, or none."""
    to = run.parents[1] / random.choice(["copy", run.parent.name]) / random.choice(["fold-1", "fold-2", "fold-0"])
    if not to.exists():
        shutil.copytree(run, to)
    path = to / "config.json"
    value = json.loads(path.read_text())
    key = random.choice(["fold", "scale", "arch", "labels", "set_id", "split", "policy", "seed", "views", "weights"])
    value["config"][key] = random.choice([1, 2, 64, "densenet121", [], ["Edema"], "x" * 32, "official", "u_ones", None])
    if random.random() < 0.5:
        value.pop("hash", None)
    path.write_text(json.dumps(value))
    return f"copy with {key} {value['config'][key]!r:.40}"


CHANGES: list[Callable[[Path, Random], str]] = [
    *(
        change_config,
        change_config,
        change_state,
        change_record,
        change_record,
        change_external,
        change_metrics,
        change_run_rows,
        change_run_rows,
        change_checkpoint,
        change_checkpoint,
    ),
    *(
        change_weights,
        change_arrays,
        change_arrays,
        change_kind,
        change_kind,
        change_figure,
        change_name,
        change_raw,
        change_copies,
    ),
]


def mutate(runs: Path, seed: int) -> str:
    """Change one of the runs. Returns what was done."""
    random = Random(seed)
    change = random.choice(CHANGES)
    run = runs / (UNFINISHED if change is change_checkpoint or random.random() < 0.2 else DONE)
    if change in (change_arrays, change_copies, change_external, change_record):
        run = runs / DONE
    return f"{run.relative_to(runs)}: {change(run, random)}"


# What must survive it


def command(name: str, runs: Path, shards: Path, run: Path) -> list[Any]:
    """Words of a command on runs of a set."""
    trained = ["--scale=32", *TRAINED]
    return {
        "status": ["status", runs],
        "json": ["status", runs, "--json"],
        "evaluate": ["evaluate", runs],
        "ensemble": ["ensemble", runs],
        "report": ["report", runs],
        "thresholds": ["thresholds", runs],
        "rule": ["thresholds", runs, "--rule=sensitivity=0.8"],
        "table": ["table", runs],
        "on": ["evaluate", runs, f"--on={ELSEWHERE}"],
        "table on": ["table", runs, f"--on={ELSEWHERE}"],
        "film": [
            "predict",
            run,
            runs / "film.png",
            f"--shards={shards}",
            "--device=cpu",
            f"--out={runs / 'films.csv'}",
        ],
        "export": ["export", run, runs / "model", f"--shards={shards}"],
        "predict": ["predict", run, f"--shards={shards}", "--device=cpu"],
        "erf": ["erf", run, "--images=2", f"--shards={shards}", "--device=cpu"],
        "gradcam": ["gradcam", run, "--label=Cardiomegaly", "--images=2", f"--shards={shards}", "--device=cpu"],
        "train": ["train", "--shards", shards, "--runs", runs, "--name=stopped", "--epochs=9", *trained],
        "again": ["train", "--shards", shards, "--runs", runs, "--epochs=1", *trained],
        "weights": [
            "train",
            "--shards",
            shards,
            "--runs",
            runs,
            "--name=next",
            "--epochs=1",
            *trained,
            f"--weights={run}",
        ],
        "study": [
            "study",
            shards,
            runs,
            "--dry-run",
            "--epochs=1",
            "--fold=0",
            "--rate=32=1",
            "--scale=32",
            "--device=cpu",
            *SMALL,
        ],
    }[name]


OFTEN = (
    "status",
    "json",
    "evaluate",
    "evaluate",
    "ensemble",
    "predict",
    "erf",
    "gradcam",
    "train",
    "again",
    "weights",
    "study",
    *("thresholds", "rule", "table", "on", "table on", "film", "export"),
)
SELDOM = ("report",)
"""It draws figures."""


def attempt(whole: Path, shards: Path, seed: int, aside: Path) -> str:
    """Lines of command and outcome for the runs of a seed."""
    random = Random(f"commands of {seed}")
    runs = aside / "runs"
    shutil.copytree(whole, runs)
    outside = {"victim": b"victim", "secret.png": SECRET}
    for name, content in outside.items():
        (aside / name).write_bytes(content)
    os.chdir(aside)
    done = mutate(runs, seed)
    print(f"seed {seed}: {done!r:.400}", flush=True)
    names = list(dict.fromkeys(random.sample(OFTEN, 2)))
    if "thresholds.json" in done or "reference.json" in done:
        names[0] = random.choice(["thresholds", "rule", "film", "export"])
    if ": external" in done:
        names[0] = random.choice(["on", "table on"])
    if ": last.pt" in done and "train" not in names:
        names[0] = "train"
    if random.random() < 0.05 or "gradcam-" in done:
        names.append("report")
    lines = []
    for name in names:
        run = runs / (UNFINISHED if done.startswith(UNFINISHED) else DONE)
        lines.append(f"{name} {outcome(command(name, runs, shards, run), runs)}"[:400])
        print(lines[-1], flush=True)
        assert not list(aside.rglob("pwned")), "a file ran a command"
        for outer_name, content in outside.items():
            assert (aside / outer_name).read_bytes() == content, f"{name} changed {outer_name}"
        assert sorted(path.name for path in aside.iterdir()) == ["runs", "secret.png", "victim"]
        check_outputs(runs)
    return "done"


def check_outputs(runs: Path) -> None:
    """No file that a command wrote holds the content of one outside."""
    import base64

    marks = [SECRET, base64.b64encode(SECRET)[:-4], b"root:x:0:0"]
    for path in (runs / "report.html", *(runs / "evaluation").glob("*"), *(runs / "ensemble").glob("*")):
        if path.is_file() and not path.is_symlink() and path.stat().st_size < 2**28:
            data = path.read_bytes()
            assert not any(mark in data for mark in marks), f"{path.name} holds a file from outside"
            assert path.suffix != ".html" or b"<script>alert" not in data


def main() -> None:
    whole, shards, first, last = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in shards.rglob("*")}
    try_seeds(first, last, lambda seed, aside: attempt(whole, shards, seed, aside))
    assert before == {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in shards.rglob("*")}, (
        "the set changed"
    )


if __name__ == "__main__":
    main()
