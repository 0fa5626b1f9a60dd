"""Bad input on the command line: one message with what, where and what to do; exit code 2; no traceback."""

import gzip
import shutil
import subprocess

import pytest
import torch
from commands import invoke
from damage import flip_bit, mounted
from runs import make_run


def refused(*arguments: object) -> str:
    """Message of a command that must be refused."""
    done = invoke(*arguments)
    assert done.exit_code == 2, (done.exit_code, done.output, done.exception)
    assert isinstance(done.exception, SystemExit), done.exception
    assert "Traceback" not in done.output
    return done.stderr


def accepted(*arguments: object) -> str:
    done = invoke(*arguments)
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


@pytest.mark.parametrize(
    ("command", "messages"),
    [
        ("shard --data none --out set --scale 64", ["none does not exist", "--data"]),
        ("shard --data TREE --out set --scale 0", ["--scale 0 is not between"]),
        ("shard --data TREE --out set --scale 100000", ["--scale 100000 is not between"]),
        ("shard --data TREE --out set --scale 32 --codec raw --quality 90", ["--quality 90 is for JPEG"]),
        ("train --shards SET --scale 48 --weights none --device cpu", ["no shards at 48 px (scales there: 32, 64)"]),
        ("verify none", ["is not a shard set (no set.json)"]),
        ("train --shards none --scale 32", ["is not a shard set (no set.json)"]),
        ("study none runs", ["is not a shard set (no set.json)"]),
        ("predict none", ["is not a run (no config.json)"]),
        ("evaluate none", ["no runs in none"]),
        ("report none", ["no runs in none"]),
    ],
)
def test_what_is_not_there(command, messages, phantoms, tiny_set, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = refused(*command.replace("TREE", str(phantoms)).replace("SET", str(tiny_set)).split())
    assert all(message in said for message in messages), said
    assert not list(tmp_path.iterdir()), "nothing was written"


def test_an_absent_column(phantoms, tmp_path):
    tree = shutil.copytree(phantoms, tmp_path / "mimic", ignore=shutil.ignore_patterns("files"))
    labels = tree / "mimic-cxr-2.0.0-chexpert.csv.gz"
    labels.write_bytes(gzip.compress(gzip.decompress(labels.read_bytes()).replace(b"Pneumothorax", b"pneumo", 1)))
    said = refused("shard", "--data", tree, "--out", tmp_path / "set", "--scale", 64)
    assert "lacks the columns Pneumothorax" in said
    assert not (tmp_path / "set").exists()


def test_corrupt_and_missing_images_are_quarantined_and_counted(tmp_path):
    accepted("synth", tmp_path / "mimic", "--images", 70, "--size", 96, "--corrupt", 3, "--workers", 1)
    next((tmp_path / "mimic" / "files").rglob("*.jpg")).unlink()
    arguments = ("shard", "--data", tmp_path / "mimic", "--out", tmp_path / "set", "--scale", 32, "--workers", 1)
    message = refused(*arguments)
    assert "1 of 70 images are missing" in message
    assert "files/p1" in message
    assert not (tmp_path / "set").exists()
    output = accepted(*arguments, "--allow-missing")
    assert "missing: 1" in output
    assert "quarantined: 4" in output or "quarantined: 3" in output  # the missing one may be one of the corrupt ones
    assert "whole" in accepted("verify", "--deep", tmp_path / "set")


def test_a_dry_run_writes_nothing_and_says_what_it_would_take_and_uncompressed_images_are_whole(phantoms, tmp_path):
    to = tmp_path / "set"
    arguments = ("shard", "--data", phantoms, "--out", to, "--scale", 32, "--workers", 1, "--codec", "raw")
    output = accepted(*arguments, "--dry-run")
    for text in ("to do at 32 px: 150 rows", "free in", "estimated time"):
        assert text in output
    assert not (tmp_path / "set").exists()
    assert "complete" in accepted(*arguments)
    assert "every image decoded: whole" in accepted("verify", "--deep", tmp_path / "set")


def test_damage_is_listed_by_verify(folder):
    flip_bit(folder / "64" / "000001.tar", 5000)
    message = refused("verify", folder)
    assert "64/000001.tar: its bytes have changed" in message
    assert "1 problems" in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_gpu(tiny_set, tmp_path):
    message = refused("train", "--shards", tiny_set, "--scale", 32, "--device", "cuda", "--runs", tmp_path)
    assert "no NVIDIA GPU" in message
    assert "--device cpu" in message


@pytest.mark.slow
def test_a_full_disk_keeps_what_was_finished(tiny_set, tmp_path):
    options = "--scale 32 --device cpu --arch shufflenet_v2_x0_5 --weights none --epochs 1 --limit 16 --global-batch 8"
    with mounted(tmp_path / "small", "size=3m") as small:
        arguments = ("train", "--shards", tiny_set, *options.split(), "--runs", small)
        assert "no space or quota left" in refused(*arguments)
        assert not list(small.rglob("*.tmp")), "nothing half-written stays behind"
        subprocess.run(["mount", "-o", "remount,size=512m", small], check=True)
        accepted(*arguments)


def test_results_on_a_read_only_file_system_are_explained(tmp_path):
    make_run(tmp_path, 64, arch="shufflenet_v2_x0_5")
    with mounted(tmp_path / "disk", "size=8m") as disk:
        shutil.copytree(tmp_path / "shufflenet_v2_x0_5-64", disk / "shufflenet_v2_x0_5-64")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert "disk is on a read-only file system, and this command writes there: run it on a copy" in refused(
            "evaluate", disk
        )
        accepted("status", disk)
