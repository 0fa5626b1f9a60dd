"""The package is the same however it is installed: from the source tree, by pip, editable, or from a wheel made of an sdist."""

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest
from lowest import lowest

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


KINDS = (".py", ".j2", ".typed", ".html", ".css", ".js", ".svg")


def files_of(package: Path) -> set[str]:
    """Modules, templates, pages and py.typed of an installed package or of the source tree, through its links."""
    found = (Path(folder, name) for folder, _, names in os.walk(package, followlinks=True) for name in names)
    return {str(path.relative_to(package)) for path in found if path.suffix in KINDS}


FILES = files_of(ROOT / "cxrfast")


def test_every_folder_with_modules_is_a_package_that_is_installed():
    folders = {Path(name).parent for name in FILES if name.endswith(".py")}
    assert all(str(folder / "__init__.py") in FILES for folder in folders)
    assert {".".join(("cxrfast", *folder.parts)) for folder in folders} == {
        *PYPROJECT["tool"]["setuptools"]["packages"]
    }


def test_the_links_and_the_packages_folders_are_the_same():
    for name, folder in PYPROJECT["tool"]["setuptools"]["package-dir"].items():
        assert (ROOT / name.replace(".", "/")).resolve() == ROOT / folder


WORKER = """
import multiprocessing

def place():
    import cxrfast.shards.building.workers as workers
    return workers.__file__

if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.apply(place))
"""


def run(command: list[object], folder: Path, **environment: str) -> str:
    """What a command in `folder` prints. It sees no PYTHONPATH but the given one."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_"))}
    done = subprocess.run(
        [str(part) for part in command], cwd=folder, env=kept | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def check(python: Path, command: list[object], folder: Path, package: Path, **environment: str) -> None:
    """The commands answer, and a worker that was spawned finds its module in `package`."""
    assert run([*command, "--help"], folder, **environment).startswith("Usage: cxrfast [OPTIONS] COMMAND")
    assert run([python, "-m", "cxrfast.train", "--help"], folder, **environment).startswith("Usage: cxrfast train")
    (folder / "worker.py").write_text(WORKER)
    found = Path(run([python, "worker.py"], folder, **environment).strip())
    assert found.resolve() == (package / "shards/building/workers.py").resolve()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the source tree: what is built in it stays out of the real one."""
    copy = tmp_path / "tree"
    ignored = shutil.ignore_patterns("__pycache__", "results")
    for name in ("cxrfast", "shards", "pipelines", "bench"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


def version(name: str) -> int:
    """The first number of an installed package's version; 0 if it is not there."""
    try:
        return int(importlib.metadata.version(name).split(".")[0])
    except importlib.metadata.PackageNotFoundError:
        return 0


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    """A virtual environment that sees this one's libraries, but not cxrfast if it is installed editable here."""
    if not importlib.util.find_spec("pip") or version("setuptools") < 77:
        pytest.skip("pip, or setuptools 77 as pyproject.toml asks for, is not installed")
    venv = tmp_path / "venv"
    run([sys.executable, "-m", "venv", "--without-pip", venv], tmp_path)
    (site_packages(venv) / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return venv


def site_packages(venv: Path) -> Path:
    return Path(sysconfig.get_path("purelib", vars={"base": str(venv)}))


def install(venv: Path, folder: Path, *what: object) -> None:
    options = ("--quiet", "--disable-pip-version-check", "--no-deps", "--no-build-isolation", "--no-index")
    run([sys.executable, "-m", "pip", "--python", venv / "bin/python", "install", *options, *what], folder)


def test_without_an_installation(tree: Path, tmp_path: Path) -> None:
    python = Path(sys.executable)
    check(python, [python, "-m", "cxrfast"], tmp_path, tree / "cxrfast", PYTHONPATH=str(tree))


@pytest.mark.slow
def test_installed_editable(tree: Path, venv: Path, tmp_path: Path) -> None:
    install(venv, tmp_path, "-e", tree)
    check(venv / "bin/python", [venv / "bin/cxrfast"], tmp_path, tree / "cxrfast")


@pytest.mark.slow
def test_installed(tree: Path, venv: Path, tmp_path: Path) -> None:
    install(venv, tmp_path, tree)
    package = site_packages(venv) / "cxrfast"
    assert files_of(package) == FILES
    check(venv / "bin/python", [venv / "bin/cxrfast"], tmp_path, package)


@pytest.mark.slow
def test_installed_from_the_wheel_of_an_sdist(tree: Path, venv: Path, tmp_path: Path) -> None:
    build = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
    sdist = tmp_path / run([sys.executable, "-c", build, tmp_path], tree).splitlines()[-1]
    shutil.rmtree(tree)
    install(venv, tmp_path, sdist)
    package = site_packages(venv) / "cxrfast"
    assert files_of(package) == FILES
    check(venv / "bin/python", [venv / "bin/cxrfast"], tmp_path, package)


def test_every_dependency_has_a_lowest_version():
    extras = PYPROJECT["project"]["optional-dependencies"].values()
    requirements = [*PYPROJECT["project"]["dependencies"], *(one for extra in extras for one in extra)]
    pins = lowest(requirements)
    assert len(pins) == len({re.split(r"[\[>=;]", one)[0] for one in requirements})
    assert pins["moto"] == "moto[server]==5.0"
    with pytest.raises(SystemExit, match="rich has no floor"):
        lowest(["click>=8", "rich"])
