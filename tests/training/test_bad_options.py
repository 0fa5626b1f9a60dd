"""Options that no training can have: one message that names the option, exit code 2, and nothing is written."""

import os
import sys
from pathlib import Path

import pytest
import torch
from commands import invoke, run
from trainings import FAST

from cxrfast.config import Runtime
from cxrfast.errors import RunError
from cxrfast.models.classifier import Classifier

GIVEN = {**FAST, "arch": "resnet18", "limit": 16, "scale": 32, "device": "cpu"}


def train(shards: Path, runs: Path, *more: str) -> tuple[int, str]:
    words = [f"--{name.replace('_', '-')}={value}" for name, value in GIVEN.items()]
    done = invoke("train", "--shards", shards, "--runs", runs, *words, *more)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, " ".join(done.output.split())


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--learning-rate=nan", "learning rate must be above 0, not nan"),
        ("--learning-rate=inf", "learning rate must be above 0, not inf"),
        ("--learning-rate=1e400", "learning rate must be above 0, not inf"),
        ("--learning-rate=-1", "learning rate must be above 0, not -1.0"),
        ("--checkpoint-minutes=nan", "--checkpoint-minutes nan must be above 0 and at most 525,600 minutes"),
        ("--checkpoint-minutes=inf", "--checkpoint-minutes inf must be above 0 and at most"),
        ("--checkpoint-minutes=-1", "--checkpoint-minutes -1 must be above 0 and at most"),
        ("--dist-timeout=nan", "--dist-timeout nan must be above 0 and at most 525,600 minutes"),
        ("--dist-timeout=-1", "--dist-timeout -1 must be above 0"),
        ("--dist-timeout=0", "--dist-timeout 0 must be above 0"),
        ("--dist-timeout=1e300", "--dist-timeout 1e+300 must be above 0 and at most"),
        ("--threads=1000000", "--threads must be at most 1,024, not 1,000,000"),
        ("--name=../../x", "--name '../../x' leads to another folder: give the name of one folder"),
        ("--name=/abs", "--name '/abs' leads to another folder"),
        ("--name=..", "--name '..' leads to another folder"),
        ("--name=.", "--name '.' leads to another folder"),
        ("--name=", "--name '' is empty"),
        ("--name= ", "--name ' ' is empty"),
        ("--name=a\nb", "--name 'a\\nb' holds the character U+000A"),
        ("--name=a\x1b[2Jb", "holds the character U+001B"),
        (f"--name={'x' * 201}", "has 201 characters, and at most 200 are allowed"),
        ("--arch=../../x", "architecture '../../x' is unknown"),
        ("--arch=", "architecture '' is unknown"),
        (
            "--micro-batch=1",
            "--micro-batch 1 at 32 px: resnet18 shrinks an image to one pixel, and BatchNorm cannot take",
        ),
        ("--sizes=32x0", "sides and epochs must be above 0"),
        ("--limit=0", "0 is not in the range x>=1"),
        ("--view=frontal", "--view 'frontal': no image of the set has this view position; those there are: "),
        ("--seed=-1", "--seed -1 is not between 0"),
        ("--rows=/", "--rows /: give a text file with one row number per line"),
        ("--rows=/dev/zero", "--rows /dev/zero: give a text file"),
        ("--rows=/nowhere", "--rows /nowhere: give a text file"),
    ],
)
def test_what_cannot_be_is_named_before_a_folder_is_made(tiny_set, tmp_path, option, message):
    code, output = train(tiny_set, tmp_path / "in" / "runs", option)
    assert (code, message in output) == (2, True), output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", [b"1\n99999999999999999999999", b"\xff\xfe1", b"-1 2", b"1.5", b"nan"])
def test_rows_that_are_no_row_numbers_are_named(tiny_set, tmp_path, text):
    (tmp_path / "rows.txt").write_bytes(text)
    code, output = train(tiny_set, tmp_path / "runs", f"--rows={tmp_path / 'rows.txt'}")
    assert (code, "--rows" in output) == (2, True), output
    assert not (tmp_path / "runs").exists()


def test_a_pipe_of_row_numbers_is_not_waited_for(tiny_set, tmp_path):
    os.mkfifo(tmp_path / "rows.txt")
    code, output = train(tiny_set, tmp_path / "runs", f"--rows={tmp_path / 'rows.txt'}")
    assert (code, "is not a regular file" in output) == (2, True), output


@pytest.mark.parametrize(
    ("option", "code"),
    [("--limit", 2), ("--checkpoint-steps", 0), ("--global-batch", 2), ("--micro-batch", 2), ("--scale", 2)],
)
def test_numbers_without_end_end_in_no_traceback(tiny_set, tmp_path, option, code):
    found, output = train(tiny_set, tmp_path / "runs", "--arch=shufflenet_v2_x0_5", "--epochs=1", f"{option}={10**30}")
    assert found == code, output


def test_a_study_refuses_the_same_options(tiny_set, tmp_path):
    for option in ("--dist-timeout=nan", "--learning-rate=inf", "--arch=../x"):
        done = invoke("study", tiny_set, tmp_path / "runs", "--device=cpu", "--weights=none", option)
        assert done.exit_code == 2, (done.output, done.exception)
        assert isinstance(done.exception, SystemExit)
    assert not list(tmp_path.iterdir())


def test_names_of_one_folder_are_allowed():
    for name in ("densenet121-256-warm", "läuft", "a b", "..x", "-x"):
        assert Runtime(shards=Path("s"), runs=Path("r"), name=name).name == name
    with pytest.raises(RunError, match="--name"):
        Runtime(shards=Path("s"), runs=Path("r"), name="a/b")


def test_one_image_per_micro_batch_is_refused_only_where_nothing_can_be_learnt_from_it():
    model = Classifier("resnet18", 3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RunError, match="use a micro-batch of 2 images or more, or a larger scale"):
        model.check_micro_batch(32, 1)
    model.check_micro_batch(64, 1)
    model.check_micro_batch(32, 2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_processes_that_do_not_meet_are_a_message(tiny_set, tmp_path):
    code = (
        "import sys; from datetime import timedelta; from cxrfast.distributed import world\n"
        "from cxrfast.errors import RunError\n"
        "try:\n"
        "    with world('cpu', timedelta(seconds=1)): pass\n"
        "except RunError as error: print(error); sys.exit(2)\n"
    )
    environment = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29417"}
    done = run(sys.executable, "-c", code, **environment)
    assert done.returncode == 2, done.stderr
    assert "the 2 processes that WORLD_SIZE=2 announces did not meet at 127.0.0.1:29417 (" in done.stdout
