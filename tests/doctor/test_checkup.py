import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from batches import CPU
from click.testing import CliRunner
from torch import nn

from cxrfast.cli.main import cli
from cxrfast.doctor import checkup, pixels, training
from cxrfast.doctor.checkup import FAILED, LEFT_OUT, OK, Check, Outcome, carry_out, checks, failed
from cxrfast.doctor.pixels import dali_pixels, host_pixels, proven_pixels, slow_reader
from cxrfast.doctor.training import (
    compiled_step,
    gradients,
    memory,
    new_trainer,
    no_compiler,
    process_group,
    waiting_in,
)
from cxrfast.errors import LoadError, RunError
from cxrfast.models.classifier import Classifier
from cxrfast.pipelines import dali, loader
from cxrfast.pipelines.dali import DaliEngine
from cxrfast.pipelines.host import HostEngine
from cxrfast.pipelines.proof import Proof
from cxrfast.pipelines.reader import Reader
from cxrfast.shards.build import build

needs_dali = pytest.mark.skipif(not dali.available(), reason="DALI is not installed")


@pytest.fixture
def reader(tiny_set: Path) -> Iterator[Reader]:
    with Reader(tiny_set, 64) as reader:
        yield reader


# Pixels


@needs_dali
def test_both_engines_pass_on_either_codec(either_set: Path) -> None:
    with Reader(either_set, 64) as reader:
        assert "bitwise" in host_pixels(reader, CPU)
        assert "decoded 100.000 %" in dali_pixels(reader, CPU)
        for engine in ("host", "dali"):
            assert "200 batches" in slow_reader(reader, CPU, engine)


class Exchanged(HostEngine):
    """Gives the images of a batch in reverse."""

    def batches(self, work):
        return (batch.flip(0) for batch in super().batches(work))


class OneBuffer(HostEngine):
    """Hands out the same memory for every batch."""

    def batches(self, work):
        buffer = None
        for batch in super().batches(work):
            buffer = batch.clone() if buffer is None or len(buffer) != len(batch) else buffer.copy_(batch)
            yield buffer


class Off(HostEngine):
    """One grey level off at one pixel of each image."""

    def batches(self, work):
        for batch in super().batches(work):
            batch[:, 0, 30, 30] ^= 1
            yield batch


class OffInThreads(HostEngine):
    """One grey level off at one pixel of the last image of a batch where it has several threads."""

    def batches(self, work):
        for batch in super().batches(work):
            if self.threads > 1:
                batch[-1, 0, 30, 30] ^= 1
            yield batch


@pytest.mark.parametrize("engine", [Exchanged, OneBuffer])
def test_a_slow_reader_sees_images_exchanged_and_buffers_used_again(reader, monkeypatch, engine) -> None:
    monkeypatch.setattr(loader, "HostEngine", engine)
    with pytest.raises(LoadError, match=r"host: \d+ of 3200 images that were read late are not those that are stored"):
        slow_reader(reader, CPU, "host")


def test_a_slow_reader_sees_rows_in_another_order(reader, monkeypatch) -> None:
    def reverse(self, rows):
        return torch.from_numpy(rows[::-1].copy())

    monkeypatch.setattr(loader.Loader, "_on_device", reverse)
    with pytest.raises(LoadError, match="rows in another order"):
        slow_reader(reader, CPU, "host")


@pytest.mark.parametrize(("engine", "what"), [(Off, "decoded and stored"), (OffInThreads, "in one thread on the CPU")])
def test_host_pixels_that_are_not_the_stored_ones_or_depend_on_threads_are_refused(
    reader, monkeypatch, engine, what
) -> None:
    monkeypatch.setattr(loader, "usable_cores", lambda: 2)
    monkeypatch.setattr(loader, "HostEngine", engine)
    with pytest.raises(LoadError, match=what):
        host_pixels(reader, CPU)


@needs_dali
@pytest.mark.parametrize(("part", "levels"), [(slice(None), 2), (slice(30, 31), 6)])
def test_dali_pixels_that_are_a_little_off_everywhere_or_far_off_anywhere_are_refused(
    reader, monkeypatch, part, levels
) -> None:
    class OffDali(DaliEngine):
        def batches(self, work):
            for batch in super().batches(work):
                image = batch.clone()
                middle = image[:, :, part, part]
                middle += torch.where(middle < 128, levels, -levels).to(torch.uint8)
                yield image

    monkeypatch.setattr(loader, "DaliEngine", OffDali)
    with pytest.raises(LoadError, match="use --engine host"):
        dali_pixels(reader, CPU)


@needs_dali
def test_pixels_that_are_not_those_of_the_manifests_are_refused(reader, monkeypatch) -> None:
    compare = Proof.compare
    monkeypatch.setattr(Proof, "compare", lambda self, images, *known: compare(self, images.flip(2), *known))
    with pytest.raises(LoadError, match=r"images that DALI decoded .* are not those of the set"):
        proven_pixels(reader, CPU)


@needs_dali
def test_an_opencv_that_turns_inexactly_is_not_compared_with(reader, monkeypatch) -> None:
    monkeypatch.setattr(pixels, "HOST_TURNS_EXACTLY", False)
    assert "turned left out: OpenCV" in dali_pixels(reader, CPU)


@needs_dali
def test_a_dali_that_always_fails_is_not_covered_by_the_host(reader, monkeypatch) -> None:
    def fail(self, batch, augmented, feed):
        raise RuntimeError("nvJPEG: CUDA error")

    monkeypatch.setattr(DaliEngine, "_pipeline", fail)
    monkeypatch.setattr(pixels, "_rows", lambda reader: reader.rows[:3])
    with pytest.raises(LoadError, match="DALI fails on images that are whole"):
        dali_pixels(reader, CPU)


# Gradients


def test_float32_and_bf16_gradients_pass_here(reader) -> None:
    assert gradients(reader, CPU).startswith("fp32: loss off by")


@pytest.mark.parametrize("what", ["gradient", "loss"])
def test_a_model_whose_gradient_or_loss_is_off_is_refused(reader, monkeypatch, what) -> None:
    class OffClassifier(Classifier):
        """Off by 1 % where it recomputes activations, which only the device's model does here."""

        def forward(self, image):
            logits = super().forward(image)
            if not self.net.features.checkpoint:
                return logits
            if what == "loss":
                return 1.01 * logits
            if logits.requires_grad:
                logits.register_hook(lambda gradient: 1.01 * gradient)
            return logits

    monkeypatch.setattr(training, "Classifier", OffClassifier)
    with pytest.raises(RunError, match=r"fp32: loss off by .* computes wrongly on cpu"):
        gradients(reader, CPU)


# A process group


def test_a_process_group_of_one_rank_works_here() -> None:
    assert process_group(CPU).startswith("gloo: gradients as without a group")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_process_group_that_cannot_be_made_says_why() -> None:
    with pytest.raises(RunError, match=r"a group of one rank on cuda:0 fails: \w*Error: "):
        process_group(torch.device("cuda", 0))


def test_a_process_group_that_does_not_answer_is_given_up(monkeypatch) -> None:
    monkeypatch.setattr(training, "GROUP_SECONDS", 0.01)
    with pytest.raises(RunError, match="no answer within"):
        process_group(CPU)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("dist.gather_object = lambda *given: None", "gather_object gives"),
        ("dist.broadcast = lambda buffer, src: buffer.add_(1)", "broadcast gives False"),
        (
            "forward = DDP.forward; DDP.forward = lambda self, image: 1.01 * forward(self, image)",
            "the gradient of 1 micro-batches differs",
        ),
    ],
)
def test_a_process_group_that_answers_wrongly_is_refused(fault: str, message: str) -> None:
    script = (
        "import torch, torch.distributed as dist\n"
        "from torch.nn.parallel import DistributedDataParallel as DDP\n"
        "from cxrfast.doctor.training import one_rank\n"
        f"{fault}\n"
        "one_rank(torch.device('cpu'))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert message in done.stderr


# Steps


def test_the_steps_whose_synchronisations_are_counted_are_those_of_a_training(reader) -> None:
    with new_trainer(reader, CPU) as trainer:
        before = [p.detach().clone() for p in trainer.model.parameters()]
        batches = trainer.train_loader.epoch(0)
        for rows in trainer.order.global_batches(0)[: training.WARM_UP + training.STEPS]:
            trainer.step(rows, batches)
        batches.close()
        assert 0.1 < float(trainer.loss.total) / 4 < 2
        assert not any(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    assert not trainer.run.folder.exists()


def test_a_set_of_too_few_rows_for_the_steps_says_so(reader, monkeypatch) -> None:
    monkeypatch.setattr(training, "MOST", 8)
    with pytest.raises(RunError, match="8 images are too few"), new_trainer(reader, CPU):
        pass


def test_synchronisations_are_counted_and_other_warnings_are_not(monkeypatch) -> None:
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)  # needs a GPU

    def step() -> None:
        warnings.warn("called a synchronizing CUDA operation\n(Triggered internally)", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    assert waiting_in(step, 2) == ["called a synchronizing CUDA operation"] * 2
    assert modes == ["warn", "default"]


def test_a_compiled_step_that_differs_is_refused(monkeypatch) -> None:
    class OffModule(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return 1.01 * self.module(image)

    monkeypatch.setattr(training, "compiled", lambda module, mode: OffModule(module))
    with pytest.raises(RunError, match="when compiled"):
        compiled_step(CPU)


def test_a_compiled_step_that_forgets_the_first_micro_batch_is_refused(monkeypatch) -> None:
    class Forgetful(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            self.module.zero_grad()
            return self.module(image)

    monkeypatch.setattr(training, "compiled", lambda module, mode: Forgetful(module))
    with pytest.raises(RunError, match="loss off by 0e"):
        compiled_step(CPU)


def test_without_a_compiler_compilation_is_left_out(monkeypatch, reader) -> None:
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "")
    assert "no C++ compiler" in no_compiler()
    left_out = {check.name: check.left_out for check in checks(reader, CPU)}
    assert "no C++ compiler" in left_out["compiled step"]


def test_the_presets_micro_batch_fits_and_its_memory_is_told(reader) -> None:
    assert "densenet121, 16 × 64 px" in memory(reader, CPU)


def test_a_micro_batch_that_does_not_fit_names_what_helps(reader, monkeypatch) -> None:
    monkeypatch.setattr(training, "memory_bytes", lambda: 600 * 2**20)
    with pytest.raises(RunError, match=r"does not fit 0.6 GiB: .*--micro-batch.*--recompute"):
        memory(reader, CPU)


# All of them


def test_a_check_that_fails_is_a_line_and_the_others_are_made(capsys) -> None:
    def wrong() -> str:
        raise LoadError("off by 3 grey levels\nmore")

    def broken() -> str:
        raise ZeroDivisionError("division by zero")

    made = [
        carry_out(check)
        for check in (
            Check("one", wrong),
            Check("two", broken),
            Check("three", wrong, "no GPU"),
            Check("four", lambda: "12 images"),
        )
    ]
    assert [(o.state, o.measured) for o in made] == [
        (FAILED, "off by 3 grey levels"),
        (FAILED, "ZeroDivisionError: division by zero"),
        (LEFT_OUT, "no GPU"),
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
    assert carry_out(gradients_).state == LEFT_OUT


def test_images_that_are_too_small_to_train_on_are_named(phantoms: Path, tmp_path: Path) -> None:
    build(phantoms, tmp_path / "set", [8], workers=1, quiet=True)
    with Reader(tmp_path / "set", 8) as reader, pytest.raises(RunError, match="cannot be trained on images of 8 px"):
        memory(reader, CPU)


def test_a_gpu_is_checked_at_each_share_of_its_jpeg_engines(reader) -> None:
    names = [check.name for check in checks(reader, torch.device("cuda"))]
    assert [name for name in names if name.startswith("DALI's pixels")] == [
        "DALI's pixels, 0% by JPEG engines",
        "DALI's pixels, 65% by JPEG engines",
        "DALI's pixels, 100% by JPEG engines",
        "DALI's pixels, the set's means",
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_everything_passes_here(tiny_set: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cxrfast", "doctor", "--deep", "--shards", str(tiny_set), "--scale", "64"],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.partition(f"Checks on cpu with {tiny_set} at 64 px\n")[2].splitlines()
    with Reader(tiny_set, 64) as reader:
        expected = checks(reader, CPU)
    assert len(lines) == len(expected)
    for line, check in zip(lines, expected, strict=True):
        assert line.startswith(check.name)
        assert f" {LEFT_OUT if check.left_out else OK} " in line
    assert "synchronisations" in next(line for line in lines if "no GPU" in line)


def test_without_a_set_phantoms_are_made_and_go(monkeypatch, capsys) -> None:
    seen: list[Path] = []

    def one(reader: Reader, device: torch.device) -> list[Check]:
        seen.append(reader.folder)
        return [Check("host's pixels", lambda: host_pixels(reader, device))]

    monkeypatch.setattr(checkup, "checks", one)
    assert [outcome.state for outcome in checkup.checkup()] == [OK]
    assert "with phantoms at 256 px" in capsys.readouterr().out
    assert not seen[0].exists()


def test_a_failure_ends_the_command_with_exit_code_2(tiny_set: Path, monkeypatch) -> None:
    outcomes = [Outcome("gradients", FAILED, "off"), Outcome("memory", OK, "1 GiB")]
    monkeypatch.setattr(checkup, "checkup", lambda shards, scale: outcomes)
    result = CliRunner().invoke(cli, ["doctor", "--deep", "--shards", str(tiny_set)])
    assert result.exit_code == 2
    assert "1 of 2 checks failed (gradients)" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shards", "SET"], "belong to --deep"),
        (["--scale", "64"], "belong to --deep"),
        (["--deep", "--shards", "SET", "--scale", "128"], "holds no shards at 128 px"),
        (["--deep", "--shards", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_checked_is_one_message(tiny_set: Path, arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(cli, ["doctor", *(str(tiny_set) if a == "SET" else a for a in arguments)])
    assert result.exit_code == 2
    assert message in result.stderr
