import re
import tarfile
import uuid
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from commands import invoke
from sets import REAL, build

from cxrfast.errors import ShardError
from cxrfast.shards.building.layout import assign_rows
from cxrfast.shards.format.manifest import read_manifest
from cxrfast.shards.format.rows import read_rows
from cxrfast.shards.images.decode import encode
from cxrfast.shards.sources.read import read_source
from cxrfast.shards.storage import Tree


def test_a_tree_may_be_given_as_text_path_or_tree_and_lie_in_an_archive(phantoms, tmp_path):
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for path in [*phantoms.glob("*.csv.gz"), next(phantoms.glob("files/*/*/*/*.jpg"))]:
            archive.write(path, f"mimic/{path.relative_to(phantoms)}")
    first = read_source("mimic", str(phantoms))
    for tree in (phantoms, Tree(phantoms), f"file://{phantoms}", f"zip://mimic::{tmp_path / 'all.zip'}"):
        source = read_source("mimic", tree)
        pd.testing.assert_frame_equal(source.images, first.images)
        assert source.counts == first.counts


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("padchest", {}, r"source 'padchest' is unknown: use mimic, chexpert, nih, table or package.module:function"),
        (
            "nih",
            {"labels": "negbio"},
            r"--labels is not an option of source nih \(its options: --allow-unmatched, --keep\)",
        ),
        ("chexpert", {"table": "t.csv"}, r"--table is not an option of source chexpert"),
        (
            "mimic",
            {"label": ["a"]},
            r"--label is not an option of source mimic \(its options: --labels, --allow-unmatched, --keep\)",
        ),
        ("mimic", {"view_column": "v"}, r"--view-column is not an option of source mimic"),
        ("table", {}, r"source table needs --table$"),
        ("table", {"tree": "x", "table": "t.csv", "label": ["a"]}, r"--tree is not an option of source table"),
    ],
)
def test_a_source_or_an_option_that_does_not_exist_is_named(phantoms, source, options, message):
    with pytest.raises(ShardError, match=message):
        read_source(source, phantoms, options)


def test_the_command_line_passes_the_options_that_were_given_to_the_source(phantoms, tmp_path):
    places = ["--data", str(phantoms), "--out", str(tmp_path / "set"), "--scale", "32", "--dry-run"]
    for arguments, code, message in (
        (("--source", "nih", "--labels", "negbio"), 2, "--labels is not an option of source nih"),
        (("--split-column", "split"), 2, "--split-column is not an option of source mimic"),
        (("--source", "x"), 2, "source 'x' is unknown"),
        (("--source", "table"), 2, "source table needs --table\n"),
        (("--labels", "negbio"), 0, "150 images"),
    ):
        done = invoke("shard", *places, *arguments)
        assert done.exit_code == code, done.output
        assert message in done.output


# Functions of others


def module(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of a name that no other test has used; its name."""
    called = f"source_{uuid.uuid4().hex}"
    (folder / f"{called}.py").write_text(text)
    monkeypatch.syspath_prepend(folder)
    return called


GOOD = """
import pandas as pd
from cxrfast.shards.sources import Source
def images(n=3):
    ids = [f"i{i}" for i in range(n)]
    return pd.DataFrame({"image_id": ids, "study_id": ids, "patient_id": "0007", "path": [f"{i}.png" for i in ids], "Mass": 1.0})
def good(tree, n: int = 3):
    return Source(images=images(n), labels=("Mass",), counts={})
def bad(tree):
    return Source(images=images().assign(Mass=2.0), labels=("Mass",), counts={})
def raises(tree):
    return images()["Masses"]
def wrong(tree):
    return images()
def refuses(tree):
    from cxrfast.errors import ShardError
    raise ShardError("no such clinic")
number = 3
"""


def test_a_function_of_one_s_own_is_a_source(tmp_path, monkeypatch):
    own = module(tmp_path, GOOD, monkeypatch)
    source = read_source(f"{own}:good", tmp_path, {"n": 5})
    assert len(source.images) == 5
    assert source.images["patient_id"].tolist() == ["0007"] * 5
    assert source.images["Mass"].dtype == np.float32
    assert source.images[["view", "split", "height", "width"]].isna().all(axis=None), "what it does not say is unknown"
    assign_rows(source.images, source.labels, 0)


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        ("{own}:bad", {}, r"hold 2\.0 for Mass: only 1, 0, -1 and blank"),
        ("{own}:raises", {}, r"failed at .*{own}.py:12: KeyError: 'Masses'"),
        ("{own}:wrong", {}, r"returned DataFrame: it must return a cxrfast.shards.sources.Source"),
        ("{own}:refuses", {}, r"^no such clinic$"),
        ("{own}:number", {}, r"is int, not a function"),
        ("{own}:absent", {}, r"cannot be imported \(AttributeError"),
        ("{own}.more:good", {}, r"cannot be imported \(ModuleNotFoundError.*name its folder in PYTHONPATH"),
        ("no_such_package:good", {}, r"cannot be imported \(ModuleNotFoundError: No module named 'no_such_package'\)"),
        ("{own} :good", {}, r"cannot be imported \(ValueError"),
        ("{mistaken}:good", {}, r"cannot be imported \(SyntaxError"),
        ("{own}:good", {"m": 1}, r"--m is not an option of source {own}:good \(its options: --n\)"),
    ],
)
def test_a_function_that_fails_is_a_message_that_says_where(tmp_path, monkeypatch, function, options, message):
    own, mistaken = (module(tmp_path, text, monkeypatch) for text in (GOOD, "def good(tree:\n"))
    with pytest.raises(ShardError, match=message.format(own=own)):
        read_source(function.format(own=own, mistaken=mistaken), tmp_path, options)


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_example_of_the_docs_works(tmp_path, monkeypatch, real):
    """On real radiographs in the layout that it describes, and on flat images."""
    text = (Path(__file__).parents[3] / "docs" / "sources.md").read_text()
    (example,) = re.findall(r"```python\n# clinic.py\n(.*?)```", text, re.DOTALL)
    own = module(tmp_path, example, monkeypatch)
    data = tmp_path / "data"
    (data / "images").mkdir(parents=True)
    if real:
        if not (REAL / "hires.csv").exists():
            pytest.skip("the real radiographs are not here")
        table = pd.read_csv(REAL / "hires.csv", dtype=str)
        with tarfile.open(REAL / "hires.tar") as archive:
            archive.extractall(data / "images", filter="data")
    else:
        findings = ["COVID-19", "No finding", "inconclusive"] * 4
        table = pd.DataFrame(
            {"file": [f"{i}.jpg" for i in range(12)], "patient_id": "001", "finding": findings, "view": "AP"}
        )
        for file in table["file"]:
            (data / "images" / file).write_bytes(encode(np.full((32, 32), 90, np.uint8), 95))
    table.to_csv(data / "2024.csv", index=False)
    build(data, tmp_path / "set", [32], source=f"{own}:clinic", source_options={"readings": "2024.csv"})
    rows = read_rows(tmp_path / "set" / "rows.parquet").set_index("image_id")
    assert len(rows) == len(table)
    for line in table.to_dict("records"):
        row = rows.loc[line["file"].removesuffix(".jpg")]
        assert row[["patient_id", "view"]].tolist() == [line["patient_id"], line["view"]]
        assert row["path"] == f"images/{line['file']}"
        assert row["Pneumonia"] == {"COVID-19": 1, "No finding": 0, "inconclusive": -1}[line["finding"]]
        assert row["No Finding"] == (line["finding"] == "No finding")
    assert not read_manifest(tmp_path / "set", 32, 0).quarantined
