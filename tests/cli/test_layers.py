"""The direction of the imports, as the design draws it."""

import ast
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "cxrfast"
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for pattern in ("*.py", "*/*.py")
    for path in sorted(PACKAGE.glob(pattern))
}

BASE = {
    "cxrfast",
    *(f"cxrfast.{name}" for name in ("errors", "config", "labels", "splits", "files", "machine", "progress")),
}
TOP = {
    "cxrfast.analysis.report": 4,
    "cxrfast.study.study": 5,
    "cxrfast.study.demo": 5,
    "cxrfast.cli.main": 7,
    "cxrfast.__main__": 8,
}
HEAVY = ("torch", "torchvision", "pandas", "matplotlib", "cv2", "pyarrow", "zarr", "sklearn", "nvidia")
CLI = "cxrfast.cli.main"


def level(module: str) -> int:
    """How high a module stands; it may import what stands lower, or in its own layer."""
    if module in BASE:
        return 0
    folder = {"shards": 1, "pipelines": 2, "bench": 6}.get(module.split(".")[1])
    return folder or TOP.get(module, 3)


def is_script_block(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


@cache
def imports(module: str, everywhere: bool = True) -> set[str]:
    """Full names of what a module imports, within functions too if `everywhere`; ours as modules, not as names in them."""
    found: set[str] = set()
    for top in ast.parse(MODULES[module].read_text()).body:
        if is_script_block(top):
            continue
        for node in ast.walk(top) if everywhere else [top]:
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{module} imports relatively"
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= {name if name in MODULES else node.module for name in names}
    return found


def ours(module: str) -> set[str]:
    return {name for name in imports(module) if name.split(".")[0] == "cxrfast"}


def roots(module: str) -> set[str]:
    return {name.split(".")[0] for name in imports(module)}


def loaded_by(module: str) -> set[str]:
    """The top-level packages that a fresh interpreter has loaded after importing `module`."""
    script = f"import sys, {module}\nprint(*{{m.split('.')[0] for m in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True, cwd=PACKAGE.parent
    )
    return set(done.stdout.split())


def test_every_folder_was_read():
    assert {
        "cxrfast.shards.build",
        "cxrfast.pipelines.order",
        "cxrfast.bench.harness",
        "cxrfast.training.train",
    } <= MODULES.keys()
    assert {level(module) for module in MODULES} >= {0, 1, 2, 3, 6, 7}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_from_its_own_layer_or_from_below(module):
    assert ours(module) <= MODULES.keys(), "all that is imported exists"
    upwards = {name for name in ours(module) if level(name) > level(module)}
    assert not upwards


def test_no_modules_import_each_other_in_a_circle():
    graph = {module: ours(module) - {module, "cxrfast"} for module in MODULES}
    assert set(TopologicalSorter(graph).static_order()) == MODULES.keys()  # CycleError where there is no such order


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("cxrfast.pipelines")])
def test_pipelines_know_nothing_of_labels_models_and_losses(module):
    below = {"cxrfast.errors", "cxrfast.files", "cxrfast.machine", "cxrfast.progress"}
    assert all(name in below or name.startswith(("cxrfast.pipelines", "cxrfast.shards")) for name in ours(module))


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("cxrfast.shards")])
def test_shards_need_neither_torch_nor_dali(module):
    assert not roots(module) & {"torch", "torchvision", "nvidia"}
    assert not loaded_by(module) & {"torch", "torchvision", "nvidia"}


@pytest.mark.parametrize("module", [m for m in MODULES if level(m) not in (6, 7)])
def test_only_the_command_line_imports_the_benchmarks(module):
    assert not [name for name in ours(module) if name.startswith("cxrfast.bench")]


@pytest.mark.parametrize("module", ["metrics", "splits", "labels", "pipelines.order", "shards.plan"])
def test_pure_modules_touch_neither_torch_nor_the_file_system(module):
    assert not roots(f"cxrfast.{module}") & {"torch", "os", "pathlib", "io", "shutil", "subprocess", "time"}


@pytest.mark.parametrize("module", [m for m in MODULES if level(m) in (3, 4, 5)])
def test_the_study_opens_no_tar(module):
    assert not roots(module) & {"tarfile", "webdataset"}


MAY_IMPORT_DALI = ("cxrfast.pipelines.dali", "cxrfast.distributed", "cxrfast.bench.loading.libraries")
"""Within functions: the engine, what tells its version, and the benchmark of DALI's own reader."""


@pytest.mark.parametrize("module", MODULES)
def test_dali_is_imported_where_it_may_be_and_there_not_before_it_is_asked_for(module):
    assert "nvidia.dali" not in imports(module, everywhere=module not in MAY_IMPORT_DALI)
    assert "nvidia.dali" in imports("cxrfast.pipelines.dali")


def test_the_command_line_answers_before_anything_heavy_is_imported():
    assert not {name.split(".")[0] for name in imports(CLI, everywhere=False)} & set(HEAVY)
    assert not loaded_by(CLI) & set(HEAVY)
