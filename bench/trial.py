"""Summary of a GPU's trial: `python -m cxrfast.bench.trial RESULTS RUNS`, the end of `bench/gpu_trial.sh`.

The folder of the steps' results comes in; trial.json and trial.md go out, with the tables of all benchmarks and the
figures that `pipelines/loader.py` needs. Exit code 1 if a step failed or a comparison came out wrong.
"""

import csv
import json
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch

from cxrfast.bench.harness import provenance
from cxrfast.bench.report import Column, markdown, table
from cxrfast.distributed import pick_device
from cxrfast.errors import CxrfastError
from cxrfast.files import write_bytes, write_json
from cxrfast.pipelines.loader import Rates
from cxrfast.runs.run import Run

LOSSES_APART = 0.01
"""Fraction by which an epoch's losses may differ between the engines: same rows and draws, almost the same pixels."""


STEPS = {name: Column(name) for name in ("call", "name", "outcome", "seconds", "command")}
"""`outcome`: ok, skipped (no time was left), timeout or failed."""

EPOCHS = {
    "run": Column("run"),
    "epoch": Column("number"),
    "train loss": Column("train_loss", ".4f"),
    "validation loss": Column("val_loss", ".4f"),
    "images/s": Column("images_per_s", ",.0f"),
    "waiting": Column("waiting_share", ".1%"),
    "torch GiB": Column("gpu_peak_bytes", ".2f", 2**30),
}


def read_steps(path: Path) -> list[dict[str, Any]]:
    """The lines of STEPS in the script's file: call, name, exit code or `skipped`, seconds, command; separated by tabs."""
    outcomes = {"0": "ok", "skipped": "skipped", "124": "timeout", "137": "timeout"}
    with open(path, newline="") as file:
        return [
            {
                "call": int(call),
                "name": name,
                "outcome": outcomes.get(code, "failed"),
                "seconds": int(seconds),
                "command": " ".join(word.rsplit("/", 1)[-1] for word in command.split()),  # no folders of this machine
            }
            for call, name, code, seconds, command in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        ]


def compare_runs(runs: dict[str, Run]) -> list[dict[str, Any]]:
    """Compare pairs of runs that must agree: what was compared, what was found, and whether it is right.

    `runs`: by the script's names; pairs that are absent are not compared.
    """
    found = []
    if {"train-host", "train-dali"} <= runs.keys():
        host, dali = ([m["train_loss"] for m in runs[f"train-{engine}"].metrics()] for engine in ("host", "dali"))
        apart = [abs(a - b) / a for a, b in zip(host, dali, strict=True)]
        found.append(
            {
                "what": f"training losses with host and with dali, within {LOSSES_APART:.0%}",
                "found": ", ".join(f"{a:.4f} and {b:.4f}" for a, b in zip(host, dali, strict=True)),
                "is_right": bool(apart) and max(apart) <= LOSSES_APART,
            }
        )
    if {"deterministic-1", "deterministic-2"} <= runs.keys():
        first, second = (runs[f"deterministic-{n}"].read_weights() for n in (1, 2))
        is_same = first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
        found.append(
            {
                "what": "weights of two runs with --deterministic, bitwise",
                "found": "the same" if is_same else "different",
                "is_right": is_same,
            }
        )
    return found


def rates(results: dict[str, Any]) -> list[Rates]:
    """The figures of this GPU for `pipelines/loader.py`, at each scale where `bench load --engines` ran and a step was measured.

    The step is the fastest of the ladder and of `bench step`.
    """
    steps: dict[int, float] = {}
    for name, result in results.items():
        if name.startswith(("ladder", "compiled", "step")):
            for line in result["lines"]:
                rounds = line["rounds"]["bare"] if name.startswith("step") else line["rounds"]
                if rounds:
                    steps[line["scale"]] = max(steps.get(line["scale"], 0), median(rounds))
    loads = [result for name, result in results.items() if name.startswith("load")]
    return [
        Rates(
            scale=engines["scale"],
            host=round(engines["host"]["B"] / load["workers"], 1),
            dali=round(max(engines["dali"]["B"].values()), 1),
            step=round(steps[engines["scale"]], 1),
        )
        for load in loads
        for engines in load["engines"]
        if engines["scale"] in steps
    ]


def trial(folder: Path, runs_folder: Path) -> bool:
    """Write trial.json and trial.md into `folder`. Return whether every step and every comparison came out right."""
    steps = read_steps(folder / "steps.tsv")
    files = [
        path for path in sorted(folder.glob("*/*.json")) if path.with_suffix(".md").exists()
    ]  # others were stopped
    results = {path.parent.name: json.loads(path.read_bytes()) for path in files}
    try:
        runs = {run.folder.parent.name: run for run in Run.find(runs_folder) if run.is_done}
    except CxrfastError:
        runs = {}
    findings, measured = compare_runs(runs), rates(results)
    where = {**provenance(pick_device("auto")), "command": "bench/gpu_trial.sh 1; bench/gpu_trial.sh 2"}
    epochs = {name: run.metrics() for name, run in runs.items()}
    values = {"steps": steps, "findings": findings, "rates": [asdict(line) for line in measured], "epochs": epochs}
    write_json(folder / "trial.json", {**values, "results": results, "provenance": where})
    lines = [{**epoch, "run": name, "number": epoch["epoch"] + 1} for name in epochs for epoch in epochs[name]]
    text = "\n".join(
        [
            f"# Trial on {where['gpu'] or where['processor']}\n",
            *(f"- {what}: {value}" for what, value in where.items() if value is not None),
            f"\n{markdown([table('Steps', STEPS, steps)])}",
            "## Findings\n",
            *(f"- {'right' if f['is_right'] else 'WRONG'}: {f['what']}: {f['found']}" for f in findings),
            f"\n{markdown([table('Epochs', EPOCHS, lines)])}",
            "## For pipelines/loader.py\n",
            *(f"    {line}," for line in measured),
            "",
        ]
    )
    tables = "\n".join(path.with_suffix(".md").read_text() for path in files)
    write_bytes(folder / "trial.md", f"{text}\n{tables}".encode())
    print(text)
    return all(s["outcome"] in ("ok", "skipped") for s in steps) and all(f["is_right"] for f in findings)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(0 if trial(Path(sys.argv[1]), Path(sys.argv[2])) else 1)
