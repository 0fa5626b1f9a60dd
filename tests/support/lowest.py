"""Tries the lowest versions that pyproject.toml admits: `python tests/support/lowest.py FOLDER`, or `make test-lowest`.

Installs exactly these versions, optional ones included, into FOLDER/venv with the Python that runs this file, refuses yanked
releases, and runs a short study on phantoms there. The packages of the extras `bench` and `test` are tools: of them only
the releases are checked. Takes several minutes and about 8 GB of disk: torch comes with CUDA.
"""

import json
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
TOOLS = ("bench", "test")
"""Extras whose packages no command needs that is run here."""

TRAIN = "--device cpu --arch shufflenet_v2_x0_5 --weights none --epochs 1 --global-batch 16 --micro-batch 8 --precision fp32"


def lowest(requirements: Iterable[str]) -> dict[str, str]:
    """`name==version` of the lowest version that each requirement admits, by name. Raises SystemExit if one has no floor."""
    pins = {}
    for requirement in map(Requirement, requirements):
        floors = [one.version for one in requirement.specifier if one.operator == ">="]
        if len(floors) != 1:
            raise SystemExit(f"{requirement} has no floor: write {requirement.name}>=VERSION")
        extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
        pins[requirement.name] = f"{requirement.name}{extras}=={floors[0]}"
    return pins


def check_releases(python: Path, pins: Iterable[str]) -> None:
    """Raises SystemExit naming the releases that were yanked; pip names those that the index lacks."""
    command = [
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--dry-run",
        "--no-deps",
        "--ignore-installed",
        "--report",
        "-",
    ]
    report = subprocess.run([*map(str, command), *pins], check=True, stdout=subprocess.PIPE).stdout
    found = [(one["metadata"], one["is_yanked"]) for one in json.loads(report)["install"]]
    if yanked := [f"{metadata['name']} {metadata['version']}" for metadata, is_yanked in found if is_yanked]:
        raise SystemExit(f"yanked: {', '.join(yanked)}; raise these floors in pyproject.toml")


def run(folder: Path, *command: object) -> None:
    print("$", *command, flush=True)
    subprocess.run(list(map(str, command)), cwd=folder, check=True)


def study(folder: Path, bin: Path) -> None:
    """A study of one epoch at two scales, then everything that reads its runs."""
    for name in ("mimic", "set", "runs"):
        shutil.rmtree(folder / name, ignore_errors=True)
    cxrfast = bin / "cxrfast"
    run(folder, cxrfast, "synth", "mimic", "--images", 60, "--size", 96)
    run(folder, cxrfast, "shard", "--data", "mimic", "--out", "set", "--scale", 32, "--scale", 64)
    run(folder, cxrfast, "verify", "set")
    for scale in (32, 64):
        run(
            folder,
            cxrfast,
            "train",
            "--shards",
            "set",
            "--runs",
            "runs",
            "--scale",
            scale,
            "--tensorboard",
            *TRAIN.split(),
        )
        one = f"runs/shufflenet_v2_x0_5-{scale}/fold-0"
        run(folder, cxrfast, "predict", one, "--device", "cpu")
    for command in ("status", "evaluate", "ensemble", "report"):
        run(folder, cxrfast, command, "runs")


def main(folder: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    used = [name for name in extras if name not in TOOLS]
    installed = lowest([*project["dependencies"], *(one for name in used for one in extras[name])])
    tools = lowest(one for name in TOOLS for one in extras[name])
    bin = folder.resolve() / "venv" / "bin"
    run(Path.cwd(), sys.executable, "-m", "venv", "--clear", folder / "venv")
    run(ROOT, bin / "python", "-m", "pip", "install", "--quiet", "--upgrade", "pip>=24")  # reports what was yanked
    check_releases(bin / "python", {**tools, **installed}.values())
    run(ROOT, bin / "pip", "install", "--quiet", *installed.values(), "-e", f"{ROOT}[{','.join(used)}]")
    run(ROOT, bin / "pip", "check")
    study(folder, bin)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
