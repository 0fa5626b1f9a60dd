"""Sets without labels, and sets with kept columns, through every command that reads them."""

import numpy as np
import pandas as pd
import pytest
from commands import invoke
from damage import contents
from sets import build, rows_of, table_arguments, write_table

from cxrfast.errors import RunError
from cxrfast.pipelines.loader import Loader
from cxrfast.pipelines.order import EvalOrder
from cxrfast.pipelines.reader import Reader
from cxrfast.shards.format.info import read_set
from cxrfast.shards.format.rows import kept_names, label_names
from cxrfast.shards.shard_set import ShardSet
from cxrfast.shards.upkeep.verify import verify

N = 20
COLUMNS = {
    "Mass": [n % 2 for n in range(N)],
    "Sex": ["F", "M"] * (N // 2),
    "Age": [f"{n}.5" if n else "" for n in range(N)],
    "Name": [f"Person {n}" for n in range(N)],
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """20 images of 20 patients, with a label, sex, age and name in their table. Not to be written to."""
    return write_table(tmp_path_factory.mktemp("clinic") / "films", [f"p{n:02d}" for n in range(N)], **COLUMNS)


@pytest.fixture(scope="module")
def unlabelled(tree, tmp_path_factory):
    """Its set without labels. Not to be written to."""
    out = tmp_path_factory.mktemp("unlabelled") / "set"
    assert invoke("shard", *table_arguments(tree, out)).exit_code == 0
    return out


KEEP = ("--keep=Sex", "--keep=Age", "--keep=Name")


@pytest.fixture(scope="module")
def kept(tree, tmp_path_factory):
    """Its set with a label and three kept columns. Not to be written to."""
    out = tmp_path_factory.mktemp("kept") / "set"
    assert invoke("shard", *table_arguments(tree, out, "Mass"), *KEEP).exit_code == 0
    return out


def test_a_forgotten_label_is_seen_before_the_build_with_the_columns_that_look_like_labels(tree, tmp_path):
    tried = invoke("shard", *table_arguments(tree, tmp_path / "set"), "--dry-run")
    assert tried.exit_code == 0
    assert "warning: no labels, so `cxrfast train` refuses this set" in tried.output
    assert "These columns look like labels: --label Mass\n" in tried.output
    assert "listed images found in the tree: 20\n" in tried.output
    said = []

    def announce(text: str) -> None:
        said.append((text, (tmp_path / "set" / "rows.parquet").exists()))

    build(tree, tmp_path / "set", [32], source="table", source_options={"table": "t.csv"}, announce=announce)
    ((text, is_laid_out),) = said
    assert "look like labels: --label Mass" in text
    assert not is_laid_out, "it is said before anything is written"
    assert "no labels" not in invoke("shard", *table_arguments(tree, tmp_path / "other", "Mass")).output


def test_images_that_no_line_lists_are_counted(tree, tmp_path):
    table = tmp_path / "some.csv"
    pd.read_csv(tree / "t.csv").iloc[:15].to_csv(table, index=False)
    done = invoke("shard", *table_arguments(tree, tmp_path / "set", "Mass"), "--table", table, "--dry-run")
    assert "listed images found in the tree: 15\n" in done.output
    assert "image files in the same folders that no line lists: 5\n" in done.output


def test_a_set_without_labels_is_verified_described_staged_and_loaded(unlabelled, tmp_path):
    assert read_set(unlabelled).labels == []
    assert label_names(rows_of(unlabelled)) == ()
    assert invoke("verify", unlabelled, "--deep").exit_code == 0
    described = invoke("describe", unlabelled, "--out", tmp_path / "description")
    assert described.exit_code == 0
    assert "0 labels" in described.output
    assert "Finding" not in described.output + (tmp_path / "description" / "describe.md").read_text()
    assert invoke("stage", unlabelled, tmp_path / "copy").exit_code == 0
    assert contents(tmp_path / "copy") == contents(unlabelled)
    with Reader(unlabelled, 32) as reader:
        batches = list(Loader(reader, EvalOrder(rows=reader.rows, micro_batch=8), device="cpu"))
    assert sorted(row for batch in batches for row in batch.row.tolist()) == list(range(N))


def test_training_without_labels_is_refused_in_one_line(unlabelled, tmp_path):
    words = ("--scale", "32", "--device", "cpu")
    for command in (("train", "--shards", unlabelled, "--runs", tmp_path), ("study", unlabelled, tmp_path)):
        done = invoke(*command, *words)
        assert done.exit_code == 2
        assert f"{unlabelled} has no labels to train on: add them with `cxrfast relabel" in done.stderr
        assert done.stderr.count("no labels") == 1
    with pytest.raises(RunError, match="the set has no labels, so no row is in a part"):
        ShardSet(unlabelled).part("train")


def test_labels_are_added_later_and_the_set_is_that_of_a_build_with_labels(tree, unlabelled, tmp_path):
    out, labelled = tmp_path / "set", tmp_path / "labelled"
    invoke("stage", unlabelled, out)
    done = invoke("relabel", out, tree / "t.csv", "--label", "Mass", "--key", "path")
    assert done.exit_code == 0, done.output
    assert "labels: Mass" in done.output
    invoke("shard", *table_arguments(tree, labelled, "Mass"))
    pd.testing.assert_frame_equal(rows_of(out), rows_of(labelled))
    assert read_set(out).id == read_set(labelled).id
    assert verify(out).problems == []
    assert len(ShardSet(out).part("train").rows) > 0


def test_labels_of_a_set_without_are_not_added_by_a_build(tree, unlabelled, tmp_path):
    out = tmp_path / "set"
    invoke("stage", unlabelled, out)
    done = invoke("shard", *table_arguments(tree, out, "Mass"))
    assert done.exit_code == 2
    assert "was built with no --label, not --label Mass: give the same, and replace labels with `cxrfast relabel`" in done.stderr  # fmt: skip
    assert invoke("shard", *table_arguments(tree, out), "--scale", "16").exit_code == 0
    assert ShardSet(out).scales == [16, 32]


# Kept columns


def test_kept_columns_are_in_the_rows_and_neither_labels_nor_part_of_the_set_s_id(kept, unlabelled):
    rows = rows_of(kept)
    assert label_names(rows) == ("Mass",)
    assert kept_names(rows) == ("kept/Sex", "kept/Age", "kept/Name")
    number = rows["image_id"].str[1:].astype(int)
    assert rows["kept/Sex"].tolist() == ["FM"[n % 2] for n in number]
    np.testing.assert_array_equal(rows["kept/Age"], [n + 0.5 if n else np.nan for n in number])
    assert read_set(kept).id == read_set(unlabelled).id
    assert read_set(kept).source_options["keep"] == ["Sex", "Age", "Name"]
    assert invoke("verify", kept, "--deep").exit_code == 0


def test_the_same_inputs_give_the_same_bytes_with_kept_columns(tree, kept, tmp_path):
    invoke("shard", *table_arguments(tree, tmp_path / "set", "Mass"), *KEEP)
    assert contents(tmp_path / "set") == contents(kept)


def test_a_scale_is_added_with_the_same_kept_columns_only(tree, kept, tmp_path):
    out = tmp_path / "set"
    invoke("stage", kept, out)
    done = invoke("shard", *table_arguments(tree, out, "Mass"), "--scale", "16", "--keep=Sex")
    assert done.exit_code == 2
    assert "was built with --keep Sex --keep Age --keep Name, not --keep Sex: give the same" in done.stderr
    assert invoke("shard", *table_arguments(tree, out, "Mass"), "--scale", "16", *KEEP).exit_code == 0


def test_relabelling_leaves_kept_columns(tree, kept, tmp_path):
    out = tmp_path / "set"
    invoke("stage", kept, out)
    table = tmp_path / "other.csv"
    pd.read_csv(tree / "t.csv")[["path"]].assign(Nodule=1).to_csv(table, index=False)
    assert invoke("relabel", out, table).exit_code == 0
    before, after = rows_of(kept), rows_of(out)
    assert label_names(after) == ("Nodule",)
    pd.testing.assert_frame_equal(after[list(kept_names(after))], before[list(kept_names(before))])
    assert invoke("verify", out).exit_code == 0


def test_a_lost_table_of_rows_is_repaired_with_its_kept_columns(tree, kept, tmp_path):
    out = tmp_path / "set"
    invoke("stage", kept, out)
    (out / "rows.parquet").unlink()
    assert invoke("verify", out, "--repair", "--data", tree).exit_code == 0
    assert contents(out) == contents(kept)


def test_describe_tabulates_kept_columns_but_names_of_people_only_where_they_are_asked_for(kept, tmp_path):
    done = invoke("describe", kept, "--out", tmp_path / "description")
    text = (tmp_path / "description" / "describe.md").read_text()
    for output in (done.output, text):
        assert "Kept columns of text" in output
        assert "Person" not in output
        assert "They may identify patients" in output
    assert "| Sex | F | 10 | 10 |" in text
    assert "| Age | all | 19 | 1 | 10.5 | 6 to 15 | 1.5 to 19.5 |" in text
    asked = invoke("describe", kept, "--out", tmp_path / "description", "--show", "Name")
    assert "Person 7" in asked.output
    wrong = invoke("describe", kept, "--out", tmp_path / "description", "--show", "name")
    assert wrong.exit_code == 2
    assert "did you mean 'Name'? it kept: Sex, Age, Name" in wrong.stderr


# Files of options


def test_options_come_from_a_file_and_the_command_line_wins(tree, kept, tmp_path):
    file = tmp_path / "films.toml"
    file.write_text(
        f'data = "{tree}"\nsource = "table"\ntable = "t.csv"\nlabel = ["Mass"]\nkeep = ["Sex", "Age", "Name"]\n'
        "scale = 64\nworkers = 1\ndry-run = true\n"
    )
    tried = invoke("shard", "--config", file, "--out", tmp_path / "set")
    assert tried.exit_code == 0, tried.output
    assert "to do at 64 px: 20 rows" in tried.output
    file.write_text(file.read_text().replace("dry-run = true", ""))
    done = invoke("shard", "--config", file, "--out", tmp_path / "set", "--scale", "32")
    assert done.exit_code == 0, done.output
    assert contents(tmp_path / "set") == contents(kept)
    file.write_text("lables = ['Mass']")
    wrong = invoke("shard", "--config", file)
    assert wrong.exit_code == 2
    assert "sets 'lables', which is not an option" in wrong.stderr
