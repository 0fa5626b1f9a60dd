"""What an import loads. Which module may import which is checked by import-linter: see `make lint`."""

import pkgutil
import sys

import pytest
from commands import run

import cxrfast

HEAVY = {"torch", "torchvision", "pandas", "matplotlib", "cv2", "pyarrow", "zarr", "sklearn", "nvidia"}
MODULES = [m.name for m in pkgutil.walk_packages(cxrfast.__path__, "cxrfast.") if m.name != "cxrfast.__main__"]


def loaded_by(*modules: str, before: str = "") -> set[str]:
    """Top-level packages that a fresh interpreter has loaded after importing `modules`."""
    code = f"import sys\n{before}\nimport {', '.join(modules)}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = run(sys.executable, "-W", "ignore", "-c", code)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_every_folder_was_found():
    known = {"cxrfast.cli.main", "cxrfast.shards.build", "cxrfast.pipelines.order", "cxrfast.bench.harness"}
    assert known <= set(MODULES)


@pytest.mark.parametrize(
    ("module", "without"),
    [
        ("cxrfast.cli.main", HEAVY),
        ("cxrfast.runs.status", {"torch", "pandas", "numpy"}),
        ("cxrfast.tables", {"rich", "numpy", "pandas"}),
        ("cxrfast.analysis.evaluate", {"nvidia", "torchvision", "cv2"}),
    ],
)
def test_a_module_loads_nothing_that_it_does_not_need(module, without):
    assert not loaded_by(module) & without


def test_shards_load_neither_torch_nor_dali():
    shards = [m for m in MODULES if m.startswith("cxrfast.shards")]
    assert not loaded_by(*shards) & {"torch", "torchvision", "nvidia"}


@pytest.mark.slow
def test_every_module_can_be_imported_where_there_is_no_dali():
    assert "torch" in loaded_by(*MODULES, before="sys.modules['nvidia.dali'] = None")
