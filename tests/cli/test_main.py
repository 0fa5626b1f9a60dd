"""Bad input on the command line: one message that says what, where and what to do, exit code 2, no traceback."""

import gzip
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from cxrfast.cli.main import cli


def refused(*arguments: object) -> str:
    """Run the command, which must be refused; its message."""
    done = CliRunner().invoke(cli, [str(a) for a in arguments])
    assert done.exit_code == 2, (done.exit_code, done.output, done.exception)
    assert isinstance(done.exception, SystemExit), done.exception
    assert "Traceback" not in done.output
    message = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else ""
    return done.stderr if message else ""


def accepted(*arguments: object) -> str:
    done = CliRunner().invoke(cli, [str(a) for a in arguments])
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


@pytest.fixture
def tree(phantoms: Path, tmp_path: Path) -> Path:
    """A copy of the phantom tree's tables, its images linked."""
    copy = tmp_path / "mimic"
    copy.mkdir()
    for path in phantoms.iterdir():
        if path.name == "files":
            (copy / "files").symlink_to(path)
        else:
            shutil.copy(path, copy)
    return copy


def test_a_missing_source_folder(tmp_path: Path) -> None:
    message = refused("shard", "--data", tmp_path / "none", "--out", tmp_path / "set", "--scale", 64)
    assert f"{tmp_path / 'none'} does not exist" in message
    assert "--data" in message


def test_a_missing_or_renamed_table(tree: Path, tmp_path: Path) -> None:
    (tree / "mimic-cxr-2.0.0-metadata.csv.gz").rename(tree / "metadata.csv.gz")
    message = refused("shard", "--data", tree, "--out", tmp_path / "set", "--scale", 64)
    assert "no mimic-cxr-2.0.0-metadata.csv or .csv.gz" in message
    assert "metadata.csv.gz" in message
    assert not (tmp_path / "set").exists()


def test_an_absent_column(tree: Path, tmp_path: Path) -> None:
    path = tree / "mimic-cxr-2.0.0-chexpert.csv.gz"
    text = gzip.decompress(path.read_bytes()).decode().replace("Pneumothorax", "pneumo", 1)
    path.write_bytes(gzip.compress(text.encode()))
    message = refused("shard", "--data", tree, "--out", tmp_path / "set", "--scale", 64)
    assert "lacks the columns Pneumothorax" in message


@pytest.mark.parametrize("scale", [0, 5, 100000])
def test_an_impossible_scale(tree: Path, tmp_path: Path, scale: int) -> None:
    assert f"--scale {scale} is not between" in refused(
        "shard", "--data", tree, "--out", tmp_path / "set", "--scale", scale
    )


def test_a_scale_that_the_set_does_not_hold(tiny_set: Path, tmp_path: Path) -> None:
    message = refused(
        "train", "--shards", tiny_set, "--scale", 48, "--weights", "none", "--device", "cpu", "--runs", tmp_path
    )
    assert "no shards at 48 px (scales there: 32, 64)" in message


def test_an_empty_set(tmp_path: Path) -> None:
    for command in (
        ["verify", tmp_path],
        ["train", "--shards", tmp_path, "--scale", 32],
        ["study", tmp_path, tmp_path / "runs"],
    ):
        assert "is not a shard set (no set.json)" in refused(*command)


def test_a_set_of_another_schema_version(tiny_set: Path, tmp_path: Path) -> None:
    value = json.loads((tiny_set / "set.json").read_text())
    (tmp_path / "set.json").write_text(json.dumps({**value, "schema": 99}))
    assert "has schema version 99, this cxrfast reads 2" in refused("verify", tmp_path)


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    assert "is not a run (no config.json)" in refused("predict", tmp_path)
    assert "no runs in" in refused("evaluate", tmp_path)
    assert "no runs in" in refused("report", tmp_path)


def test_corrupt_and_missing_images_are_quarantined_and_counted(tmp_path: Path) -> None:
    accepted("synth", tmp_path / "mimic", "--images", 70, "--size", 96, "--corrupt", 3, "--workers", 1)
    victim = next((tmp_path / "mimic" / "files").rglob("*.jpg"))
    victim.unlink()
    arguments = ("shard", "--data", tmp_path / "mimic", "--out", tmp_path / "set", "--scale", 32, "--workers", 1)
    message = refused(*arguments)
    assert "1 of 70 images are missing" in message
    assert "files/p1" in message
    assert not (tmp_path / "set").exists()
    output = accepted(*arguments, "--allow-missing")
    assert "missing: 1" in output
    assert "quarantined: 4" in output or "quarantined: 3" in output  # the missing one may be one of the corrupt ones
    assert "whole" in accepted("verify", "--deep", tmp_path / "set")


def test_uncompressed_images_have_no_quality(tree: Path, tmp_path: Path) -> None:
    arguments = ("shard", "--data", tree, "--out", tmp_path / "set", "--scale", 32, "--workers", 1, "--codec", "raw")
    assert "--quality 90 is of JPEG" in refused(*arguments, "--quality", 90)
    assert not (tmp_path / "set").exists()
    assert "complete" in accepted(*arguments)
    assert "every image decoded: whole" in accepted("verify", "--deep", tmp_path / "set")


def test_a_dry_run_writes_nothing_and_says_what_it_would_take(tree: Path, tmp_path: Path) -> None:
    output = accepted("shard", "--data", tree, "--out", tmp_path / "set", "--scale", 32, "--scale", 64, "--dry-run")
    assert "to do at 32 px: 150 rows" in output
    assert "free in" in output
    assert "estimated time" in output
    assert not (tmp_path / "set").exists()


def test_damage_is_listed_by_verify(tiny_set: Path, tmp_path: Path) -> None:
    copy = tmp_path / "set"
    shutil.copytree(tiny_set, copy)
    tar = copy / "64" / "000001.tar"
    data = bytearray(tar.read_bytes())
    data[5000] ^= 1
    tar.write_bytes(data)
    message = refused("verify", copy)
    assert "64/000001.tar: its bytes have changed" in message
    assert "1 problems" in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_gpu(tiny_set: Path, tmp_path: Path) -> None:
    message = refused("train", "--shards", tiny_set, "--scale", 32, "--device", "cuda", "--runs", tmp_path)
    assert "no NVIDIA GPU" in message
    assert "--device cpu" in message


@pytest.mark.skipif(os.geteuid() != 0, reason="a small file system needs root")
def test_a_full_disk_keeps_what_was_finished(phantoms: Path, tiny_set: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        options = (
            "--scale 32 --device cpu --arch shufflenet_v2_x0_5 --weights none --epochs 1 --limit 16 --global-batch 8"
        )
        arguments = ("train", "--shards", tiny_set, *options.split(), "--runs", small)
        message = refused(*arguments)
        assert "no space or quota left" in message
        assert not list(small.rglob("*.tmp")), "nothing half-written stays behind"
        subprocess.run(["mount", "-o", "remount,size=512m", small], check=True)
        accepted(*arguments)
    finally:
        subprocess.run(["umount", small], check=True)
