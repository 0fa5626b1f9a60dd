"""Where `cxrfast shard` writes when nobody says where, and which of several errors it names first."""

import os
import shutil
import sys
from pathlib import Path

import pytest
from commands import run
from sets import build

from cxrfast.errors import ShardError
from cxrfast.shards.build import default_out
from cxrfast.shards.format.info import is_laid_out

SHARD = ("-m", "cxrfast", "shard", "--scale", "16", "--workers", "1")


def shard(folder: Path, *words: str, **environment: str):
    variables = {"CXRFAST_SHARDS": "", **environment}
    command = ["env", *(["-u", "CXRFAST_SHARDS"] if not variables["CXRFAST_SHARDS"] else []), sys.executable]
    return run(*command, *SHARD, *words, folder=folder, **{k: v for k, v in variables.items() if v})


def test_the_default_folder_is_next_to_the_tree_that_would_contain_it_and_the_report_says_so(phantoms, tmp_path):
    shutil.copytree(phantoms, tmp_path / "data")
    done = shard(tmp_path, "--data", "data", "--limit", "1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(
        "--out is data-shards, since data/shards would lie inside --data data; give other commands"
    )
    assert is_laid_out(tmp_path / "data-shards")
    assert not (tmp_path / "data" / "shards").exists()
    assert "overlap" in shard(tmp_path, "--data", "data", CXRFAST_SHARDS="data/sets").stderr, (
        "what was asked for is meant"
    )
    assert "overlap" in shard(tmp_path, "--data", "data", "--out", "data/shards").stderr


def test_the_default_folder_stays_where_it_does_not_collide(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    usual = Path("data/shards")
    (tmp_path / "data" / "mimic").mkdir(parents=True)
    assert default_out("data/mimic", usual) == usual
    assert default_out("memory://data", usual) == usual
    assert default_out("data", usual) == Path("data-shards")
    assert default_out(f"{tmp_path}/data/", usual) == tmp_path / "data-shards"
    assert default_out(f"file://{tmp_path}/data", usual) == tmp_path / "data-shards"
    assert default_out(".", usual) == tmp_path.with_name(f"{tmp_path.name}-shards")
    assert default_out("data/shards", usual) == Path("data/shards-shards")
    os.symlink("data", "link")
    assert default_out("link", usual) == Path("link-shards")


def test_errors_of_the_table_come_before_that_of_the_folder(phantoms, tmp_path):
    tree = Path(shutil.copytree(phantoms, tmp_path / "mimic"))
    (tree / "mimic-cxr-2.0.0-metadata.csv.gz").unlink()
    with pytest.raises(ShardError, match=r"mimic-cxr-2\.0\.0-metadata"):
        build(tree, tree / "shards", [16])
    with pytest.raises(ShardError, match="does not exist"):
        build(tmp_path / "nothing", tmp_path, [16])
