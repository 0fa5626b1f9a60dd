import dataclasses
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from commands import invoke
from damage import contents, copy_set, flip_bit, repair
from sets import MIMIC_CHEXPERT, WRITTEN, chexpert, is_as_planned, other_labels, rows_of
from trainings import SHORT

from cxrfast.analysis.evaluate import evaluate
from cxrfast.config import Runtime
from cxrfast.distributed import World
from cxrfast.errors import RunError, ShardError
from cxrfast.labels import MIMIC
from cxrfast.runs.run import Run
from cxrfast.shards.build import build
from cxrfast.shards.format.info import read_set, read_set_json
from cxrfast.shards.format.lock import Lock
from cxrfast.shards.format.names import shard_path
from cxrfast.shards.format.rows import COLUMNS, REFERENCE, label_names, reference_names, write_rows
from cxrfast.shards.shard_set import ShardSet
from cxrfast.shards.upkeep.relabel import relabel
from cxrfast.shards.upkeep.verify import verify
from cxrfast.training.predict import predict
from cxrfast.training.setup import make_config, select_rows
from cxrfast.training.train import train


@pytest.fixture(scope="module")
def other(phantoms, tmp_path_factory):
    """A CSV with other values of the fourteen labels for all studies."""
    path = tmp_path_factory.mktemp("other") / "other.csv"
    other_labels(chexpert(phantoms)).to_csv(path, index=False)
    return path


# What changes


def test_relabelling_with_the_labels_it_has_changes_only_where_they_are_from(phantoms, tiny_set, folder):
    assert read_set(folder).labels_from == ""
    result = relabel(folder, phantoms / MIMIC_CHEXPERT)
    assert is_as_planned(folder, tiny_set, phantoms / MIMIC_CHEXPERT)
    listed = rows_of(folder)["study_id"].isin(chexpert(phantoms)["study_id"].astype(str))
    assert (result.by, result.key, result.matched) == ("study_id", "study_id", listed.sum())
    assert result.unmatched["images"].sum() == (~listed).sum() > 0, "MIMIC has studies without a line, too"


def test_labels_become_those_of_the_table_however_often_and_nothing_else_changes(other, tiny_set, folder):
    result = relabel(folder, other)
    before, after = rows_of(tiny_set), rows_of(folder)
    table = pd.read_csv(other, dtype={"study_id": str})
    expected = after[["study_id"]].merge(table, how="left", on="study_id")[list(MIMIC)]
    pd.testing.assert_frame_equal(after[list(MIMIC)], expected.astype(np.float32))
    assert not after[list(MIMIC)].equals(before[list(MIMIC)])
    pd.testing.assert_frame_equal(after[list(COLUMNS)], before[list(COLUMNS)])
    assert result.labelled == expected.notna().any(axis=1).sum()
    changed = {name for name, data in contents(folder).items() if data != contents(tiny_set)[name]}
    assert changed == WRITTEN
    assert verify(folder).problems == []
    assert dataclasses.replace(read_set(folder), labels_from="") == read_set(tiny_set)
    once = contents(folder)
    relabel(folder, other)
    assert contents(folder) == once
    assert read_set_json(folder) == read_set(folder)
    reference = f"{REFERENCE}Pneumonia"
    write_rows(folder / "rows.parquet", after.assign(**{reference: np.float32(1)}), read_set(folder))
    (folder / "SHA256SUMS").unlink()
    relabel(folder, other)
    assert reference_names(rows_of(folder)) == (reference,)
    assert rows_of(folder)[reference].eq(1).all()
    assert label_names(rows_of(folder)) == MIMIC


def test_other_names_replace_all_former_ones_in_the_set_s_description_too(phantoms, tiny_set, folder, tmp_path):
    table = chexpert(phantoms)[["study_id"]].assign(Zebra=1, Apple=[0, -1] * (len(chexpert(phantoms)) // 2))
    table.to_csv(tmp_path / "t.csv", index=False)
    result = relabel(folder, tmp_path / "t.csv")
    assert label_names(rows_of(folder)) == tuple(read_set(folder).labels) == ("Zebra", "Apple")
    assert (result.before, result.left) == (MIMIC, [])
    assert dataclasses.replace(read_set(folder), labels=list(MIMIC), labels_from="") == read_set(tiny_set)
    assert verify(folder).problems == []
    relabel(folder, tmp_path / "t.csv", labels=["Apple", "Zebra"])
    assert read_set(folder).labels == ["Zebra", "Apple"], "in the table's order"
    relabel(folder, phantoms / MIMIC_CHEXPERT)
    assert is_as_planned(folder, tiny_set, phantoms / MIMIC_CHEXPERT), "and back again"


# What does not match


def test_ids_of_one_side_alone_are_counted_listed_and_blank(phantoms, folder, tmp_path):
    table = chexpert(phantoms).astype({"study_id": str})
    kept = table.iloc[30:]
    gone = sorted(set(rows_of(folder)["study_id"]) - set(kept["study_id"]))
    added = [f"9{i:07d}" for i in range(25)]
    strangers = table.iloc[:25].assign(study_id=added)
    pd.concat([kept, strangers]).sample(frac=1, random_state=3).to_csv(tmp_path / "t.csv", index=False)
    before, command = contents(folder), ("relabel", folder, tmp_path / "t.csv", "--unmatched", tmp_path / "out.csv")
    refused = invoke(*command)
    assert refused.exit_code == 2
    assert (
        f"{len(gone)} of the {len(gone) + len(kept)} studies in {folder} are not in {tmp_path}/t.csv" in refused.output
    )
    assert f"and 25 of the {len(kept) + 25} studies in {tmp_path}/t.csv are not in {folder}" in refused.output
    assert "--allow-unmatched (--unmatched FILE lists them); nothing was changed" in refused.output
    assert contents(folder) == before
    done = invoke(*command, "--allow-unmatched")
    assert done.exit_code == 0, done.output
    rows = rows_of(folder)
    lost = rows["study_id"].isin(gone)
    assert rows.loc[lost, list(MIMIC)].isna().all().all()
    assert f"{(~lost).sum()} of 150 images found" in done.stdout
    assert (
        f"only in the set, now blank: {len(gone)} studies: {', '.join(gone[:20])} and {len(gone) - 20} more"
        in done.stdout
    )
    assert f"only in the table: 25 studies: {', '.join(added[:20])} and 5 more" in done.stdout
    listed = pd.read_csv(tmp_path / "out.csv", dtype={"study_id": str})
    assert listed.query("only_in == 'set'")["study_id"].tolist() == gone
    assert listed.query("only_in == 'table'")["study_id"].tolist() == added
    assert listed["images"].sum() == lost.sum()
    assert verify(folder).problems == []


def test_more_than_half_of_the_images_without_a_label_are_warned_of(phantoms, folder, tmp_path):
    studies = rows_of(folder)["study_id"].drop_duplicates()
    for keep, warns in ((0.2, True), (0.9, False)):
        studies.sample(frac=keep, random_state=1).to_frame().assign(ill=1).to_csv(tmp_path / "t.csv", index=False)
        done = invoke("relabel", folder, tmp_path / "t.csv", "--allow-unmatched")
        blank = rows_of(folder)["ill"].isna().sum()
        assert bool(blank > 75) is warns
        assert (f"warning: {blank} of 150 images have no label now" in done.stdout.splitlines()[-1]) is warns


# Refused


def test_a_set_behind_a_url_is_refused_as_it_was_typed(other):
    for command in (["relabel", "s3://bucket/set", str(other)], ["describe", "s3://bucket/set"]):
        done = invoke(*command)
        assert done.exit_code == 2
        message = " ".join(done.stderr.split())
        assert "s3://bucket/set is a URL, but this must be a local path: `cxrfast stage` copies" in message


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("", "is a folder: name a file"),
        ("none/u.csv", "there is no writable folder"),
        ("set/32/unmatched.csv", "is inside the set"),
    ],
)
def test_a_list_of_unmatched_ids_that_cannot_be_written_is_refused_first(where, message, tiny_set, folder, tmp_path):
    done = invoke("relabel", folder, "no-table.csv", "--unmatched", tmp_path / where)
    assert done.exit_code == 2
    assert message in done.stderr
    assert str(tmp_path / where) in done.stderr
    assert ".tmp" not in done.stderr
    assert contents(folder) == contents(tiny_set)


def test_damage_is_not_signed_again_but_stays_visible_and_a_set_that_is_being_written_is_left_alone(other, folder):
    flip_bit(shard_path(folder, 32, 1, "idx"), 5)
    relabel(folder, other)
    assert [(p.path, p.what) for p in verify(folder).problems] == [("32/000001.idx", "its bytes have changed")]
    before = contents(folder)
    with Lock(folder), pytest.raises(ShardError, match="is being built by process"):
        relabel(folder, other)
    assert contents(folder) == before
    flip_bit(folder / "rows.parquet", 2000)
    before = contents(folder)
    with pytest.raises(ShardError, match=r"rows\.parquet is damaged: repair it first, with `cxrfast verify --repair"):
        relabel(folder, other)
    assert contents(folder) == before


# Killed


AT_EVERY_INSTANT = """
import os, shutil, signal, sys
from cxrfast.shards.upkeep.relabel import relabel

start, table, out = sys.argv[1:]
for n in range(1, 100):
    folder = f"{out}/{n:02d}"
    shutil.copytree(start, folder)
    child = os.fork()
    if child == 0:
        seen = 0

        def hook(event, args):
            global seen
            write = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)
            if (write or event in ("os.rename", "os.remove")) and str(args[0]).startswith(folder):
                seen += 1
                if seen == n:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        relabel(folder, table)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
"""
"""Relabels copies of a set, the n-th of which is killed before it opens, renames or removes its n-th file."""


@pytest.mark.parametrize("finished", [True, False])
def test_killed_at_any_instant_its_labels_are_all_old_or_all_new_and_the_same_call_finishes_it(
    finished, phantoms, tiny_set, tmp_path
):
    start, table = copy_set(tiny_set, tmp_path / "start"), tmp_path / "t.csv"
    if not finished:
        (start / "SHA256SUMS").unlink()
    chexpert(phantoms)[["study_id"]].assign(Pneumonia=1, Zebra=0).to_csv(table, index=False)
    relabel(copy_set(start, tmp_path / "whole"), table)
    before, after = contents(start), contents(tmp_path / "whole")
    (tmp_path / "killed").mkdir()
    command = [sys.executable, "-c", AT_EVERY_INSTANT, start, table, tmp_path / "killed"]
    subprocess.run(command, check=True, timeout=100)
    *killed, last = sorted((tmp_path / "killed").iterdir())
    assert len(killed) >= 6
    assert contents(last) == after
    half = 0
    for number, folder in enumerate(killed):
        shards = ShardSet(folder)
        assert tuple(shards.info.labels) == label_names(shards.rows()) in (MIMIC, ("Pneumonia",))
        there = {n: d for n, d in contents(folder).items() if n in before}
        half += there not in (before, after)
        if finished and there not in (before, after):
            assert {problem.path for problem in verify(folder).problems} & {"rows.parquet", "set.json"}
        if there["rows.parquet"] == before["rows.parquet"] or number % 3 == 0:
            relabel(folder, table)
        elif finished and number % 3 == 1:
            assert repair(folder).failed == {}
        else:
            assert build(phantoms, folder, [32, 64], workers=1).complete
        assert {**contents(folder), "SHA256SUMS": b""} == {**after, "SHA256SUMS": b""}
        if (folder / "SHA256SUMS").exists():
            assert verify(folder).problems == []
    assert half >= 2


@pytest.mark.parametrize("marker", ["SHA256SUMS.relabelling", "SHA256SUMS.unfinished"])
@pytest.mark.parametrize("command", ["relabel", "shard"])
def test_what_an_earlier_version_left_half_done_is_finished(
    marker, command, other, phantoms, tiny_set, folder, tmp_path
):
    """It renamed SHA256SUMS while it wrote, and kept only the shards' lines while it built."""
    sums = (folder / "SHA256SUMS").read_text()
    (folder / "SHA256SUMS").unlink()
    if marker.endswith("unfinished"):
        sums = "".join(line for line in sums.splitlines(keepends=True) if "/" in line)
    (folder / marker).write_text(sums)
    if command == "relabel":
        relabel(folder, other)
        if marker.endswith("unfinished"):
            assert (folder / "SHA256SUMS").read_text() == sums
            assert build(phantoms, folder, [32, 64], workers=1).complete
        relabel(whole := copy_set(tiny_set, tmp_path / "whole"), other)
        assert contents(folder) == contents(whole)
    else:
        build(phantoms, folder, [32, 64], workers=1)
        assert contents(folder) == contents(tiny_set)


def test_a_set_that_is_half_built_stays_so_and_its_build_goes_on(other, phantoms, tiny_set, folder):
    (folder / "SHA256SUMS").unlink()
    for scale in (32, 64):
        for suffix in ("tar", "idx", "json"):
            shard_path(folder, scale, 1, suffix).unlink()
    relabel(folder, other)
    assert not (folder / "SHA256SUMS").exists()
    assert build(phantoms, folder, [32, 64], workers=1).complete
    assert verify(folder).problems == []
    whole = copy_set(tiny_set, folder.parent / "whole")
    relabel(whole, other)
    assert rows_of(folder).equals(rows_of(whole))
    assert read_set(folder) == read_set(whole)


# Runs


@pytest.mark.slow
def test_runs_stay_valid_with_the_labels_they_were_trained_on_and_later_ones_use_the_new(
    phantoms, other, tiny_set, tmp_path
):
    folder, runs = copy_set(tiny_set, tmp_path / "set"), tmp_path / "runs"

    def trained(fold: int) -> Run:
        config = make_config(folder, 32, device="cpu", arch="resnet18", fold=fold, **SHORT)
        run = train(config, Runtime(shards=folder, runs=runs, device="cpu"))
        predict(run, World(torch.device("cpu")))
        return run

    old = trained(0)
    rows, evaluated = old.rows(), evaluate(runs)
    shutil.rmtree(old.folder / "predictions.zarr")
    relabel(folder, other)
    predict(old, World(torch.device("cpu")))
    after = evaluate(runs).table
    pd.testing.assert_frame_equal(after.drop(columns="remark"), evaluated.table.drop(columns="remark"))
    assert set(evaluated.table["remark"]) == {""}
    assert after["remark"].str.fullmatch(r"its set has other labels now, \d+ labels of \d+ rows").all()
    pd.testing.assert_frame_equal(old.rows(), rows)
    new = trained(1)
    now, table = new.rows(), rows_of(folder).set_index("row")
    pd.testing.assert_frame_equal(now[list(MIMIC)], table.loc[now["row"], list(MIMIC)].reset_index(drop=True))
    with pytest.raises(RunError, match=r"fold-0 and resnet18-32/fold-1 cannot be joined: [\d,]+ labels of shared"):
        evaluate(runs)


def test_a_configuration_from_before_the_relabelling_is_refused(tiny_set, folder, tmp_path):
    config = make_config(folder, 32, device="cpu", weights="none", global_batch=8, precision="fp32")
    rows_of(tiny_set)[["image_id"]].assign(ill=1).to_csv(tmp_path / "t.csv", index=False)
    relabel(folder, tmp_path / "t.csv")
    with pytest.raises(RunError, match="has no label Atelectasis any more, it was relabelled"):
        select_rows(rows_of(folder), config, np.arange(150))
