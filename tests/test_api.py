"""What other programs may import: the names of `cxrfast`, and the modules that README and docs name."""

import re
import sys
from importlib import import_module
from pathlib import Path

import pytest
from commands import run

import cxrfast

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
NAMES = [
    "Augment",
    "EvalOrder",
    "Loader",
    "Reader",
    "Run",
    "ShardSet",
    "Source",
    "TrainOrder",
    "__version__",
    "build",
    "load",
]
DOCUMENTED = {
    ("cxrfast.pipelines.loader", "Loader"),
    ("cxrfast.pipelines.order", "Augment"),
    ("cxrfast.pipelines.order", "EvalOrder"),
    ("cxrfast.pipelines.order", "TrainOrder"),
    ("cxrfast.pipelines.reader", "Reader"),
    ("cxrfast.shards.columns", "read_table"),
    ("cxrfast.shards.sources", "Source"),
    ("cxrfast.shards.sources.source", "Source"),
    ("cxrfast.shards.tree", "Tree"),
}
"""Of this version and of earlier ones: programs written for them still import."""


def in_docs() -> set[tuple[str, str]]:
    """(module, name) of each `from cxrfast… import …` in README and docs."""
    found = set()
    for path in PAGES:
        for module, names in re.findall(r"^ *from (cxrfast[\w.]*) import (.+)$", path.read_text(), re.MULTILINE):
            found |= {(module, name.strip()) for name in names.split(",")}
    return found


def test_the_public_names_are_frozen():
    assert cxrfast.__all__ == NAMES
    assert set(NAMES) <= {*dir(cxrfast)}
    assert sorted(cxrfast.MODULES) == sorted(set(NAMES) - {"__version__"})


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_is_what_its_module_defines(name):
    value = getattr(cxrfast, name)
    if name in cxrfast.MODULES:
        assert value is getattr(import_module(cxrfast.MODULES[name]), name)
        assert value.__module__ == cxrfast.MODULES[name]
        assert value.__doc__


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'cxrfast' has no attribute 'Leader'"):
        _ = cxrfast.Leader
    with pytest.raises(ImportError):
        exec("from cxrfast import Leader")


@pytest.mark.parametrize(("module", "name"), sorted(DOCUMENTED | in_docs()))
def test_what_the_documentation_imports_is_there(module, name):
    assert hasattr(import_module(module), name)


def test_the_documentation_was_read():
    assert ("cxrfast", "Loader") in in_docs()


@pytest.mark.parametrize(
    ("code", "heavy"),
    [
        ("import cxrfast", {"torch", "pandas", "numpy", "cv2"}),
        ("from cxrfast import Reader, ShardSet, Source, TrainOrder, build", {"torch"}),
    ],
)
def test_importing_the_package_or_its_names_of_shards_loads_nothing_that_they_do_not_need(code, heavy):
    done = run(sys.executable, "-c", f"{code}; import sys; print(*{heavy} & sys.modules.keys())")
    assert (done.stdout, done.stderr) == ("\n", "")
