"""All checks together: what they print, and how the command ends."""

import sys
from pathlib import Path

import pytest
import torch
from batches import CPU
from commands import invoke, run

from cxrfast.doctor import checkup
from cxrfast.doctor.checkup import FAILED, OK, SKIPPED, Check, Outcome, carry_out, checks, failed
from cxrfast.doctor.pixels import host_pixels
from cxrfast.errors import LoadError
from cxrfast.pipelines.reader import Reader


def test_a_check_that_fails_is_a_line_and_the_others_are_made(capsys) -> None:
    def wrong() -> str:
        raise LoadError("off by 3 grey levels\nmore")

    def broken() -> str:
        raise ZeroDivisionError("division by zero")

    planned = (
        Check("one", wrong),
        Check("two", broken),
        Check("three", wrong, "no GPU"),
        Check("four", lambda: "12 images"),
    )
    made = [carry_out(check) for check in planned]
    assert [(o.state, o.measured) for o in made] == [
        (FAILED, "off by 3 grey levels"),
        (FAILED, "ZeroDivisionError: division by zero"),
        (SKIPPED, "no GPU"),
        (OK, "12 images"),
    ]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["one", "two", "three", "four"]
    assert lines[0].endswith("s  off by 3 grey levels")
    assert failed(made) == "2 of 4 checks failed (one; two): see their lines above"
    assert failed(made[2:]) == ""


def test_gradients_of_fewer_than_eight_images_are_left_out(reader, monkeypatch) -> None:
    monkeypatch.setattr(type(reader), "rows", reader.rows[:7])
    (gradients_,) = [check for check in checks(reader, CPU) if check.name == "gradients"]
    assert carry_out(gradients_).state == SKIPPED


def test_a_gpu_is_checked_at_each_share_of_its_jpeg_engines(reader) -> None:
    names = [check.name for check in checks(reader, torch.device("cuda"))]
    assert [name for name in names if name.startswith("DALI's pixels")] == [
        "DALI's pixels, 0% by JPEG engines",
        "DALI's pixels, 65% by JPEG engines",
        "DALI's pixels, 100% by JPEG engines",
        "DALI's pixels, the set's means",
    ]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_everything_passes_here(tiny_set: Path) -> None:
    words = ("doctor", "--deep", "--shards", tiny_set, "--scale", "64")
    done = run(sys.executable, "-m", "cxrfast", *words, timeout=600, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.partition(f"Checks on cpu with {tiny_set} at 64 px\n")[2].splitlines()
    with Reader(tiny_set, 64) as reader:
        expected = checks(reader, CPU)
    assert len(lines) == len(expected)
    for line, check in zip(lines, expected, strict=True):
        assert line.startswith(check.name)
        assert f" {SKIPPED if check.skipped else OK} " in line
    assert "synchronisations" in next(line for line in lines if "no GPU" in line)


def test_without_a_set_phantoms_are_made_and_go(monkeypatch, capsys) -> None:
    seen: list[Path] = []

    def one(reader: Reader, device: torch.device) -> list[Check]:
        seen.append(reader.folder)
        return [Check("host's pixels", lambda: host_pixels(reader, device))]

    monkeypatch.setattr(checkup, "checks", one)
    monkeypatch.setattr(checkup, "PHANTOMS", 16)
    assert [outcome.state for outcome in checkup.checkup()] == [OK]
    assert "with phantoms at 256 px" in capsys.readouterr().out
    assert not seen[0].exists()


def test_a_failure_ends_the_command_with_exit_code_2(tiny_set: Path, monkeypatch) -> None:
    outcomes = [Outcome("gradients", FAILED, "off"), Outcome("memory", OK, "1 GiB")]
    monkeypatch.setattr(checkup, "checkup", lambda shards, scale: outcomes)
    result = invoke("doctor", "--deep", "--shards", tiny_set)
    assert result.exit_code == 2
    assert "1 of 2 checks failed (gradients)" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shards", "SET"], "need --deep"),
        (["--scale", "64"], "need --deep"),
        (["--deep", "--shards", "SET", "--scale", "128"], "holds no shards at 128 px"),
        (["--deep", "--shards", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_checked_is_one_message(tiny_set: Path, arguments: list[str], message: str) -> None:
    result = invoke("doctor", *(tiny_set if a == "SET" else a for a in arguments))
    assert result.exit_code == 2
    assert message in result.stderr
