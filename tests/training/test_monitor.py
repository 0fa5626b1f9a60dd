"""Decisions between steps, the reported rate, and the time spent waiting."""

import signal
import time
from contextlib import nullcontext

import pytest
import torch
from trainings import CUDA, make_trainer, needs_gpu

from cxrfast.config import TrainConfig
from cxrfast.distributed import World
from cxrfast.pipelines.loader import Loader
from cxrfast.pipelines.order import TrainOrder
from cxrfast.pipelines.reader import Reader
from cxrfast.training.checkpoint import Counters
from cxrfast.training.monitor import Action, Monitor, Timed, is_over


def slow(batches, seconds: float):
    for batch in batches:
        time.sleep(seconds)
        yield batch


def test_on_a_cpu_waiting_is_the_time_that_the_next_batch_takes(tiny_set):
    with Reader(tiny_set, 32) as reader:
        batches = Timed(slow(Loader(reader, TrainOrder(rows=reader.rows, global_batch=8, micro_batch=8)), 0.02))
        for _ in range(5):
            next(batches)
        batches.close()
    assert batches.waited >= 0.1


@needs_gpu
@pytest.mark.parametrize("busy", [False, True])
def test_on_a_gpu_waiting_is_the_time_that_the_gpu_has_nothing_to_do(tiny_set, busy):
    """The host waits 0.1 s for its batches in both cases; a GPU that is busy meanwhile waits for none of it."""
    with Reader(tiny_set, 32) as reader:
        order = TrainOrder(rows=reader.rows, global_batch=8, micro_batch=8)
        loader = Loader(reader, order, device="cuda", engine="host")
        for _ in loader:  # pinned memory is got once, which may wait for the GPU
            pass
        batches = Timed(slow(loader, 0.02), CUDA)
        with torch.cuda.stream(torch.cuda.Stream()) if not busy else nullcontext():
            for n in range(6):
                next(batches)
                if n == 0:
                    torch.cuda.synchronize()
                    first = batches.waited
                if busy:
                    torch.cuda._sleep(10**9)  # half a second and more
        batches.close()
    assert (batches.waited - first < 0.05) if busy else (batches.waited - first > 0.09)


def test_after_some_steps_a_run_reports_its_rate_and_what_is_left(tiny_set, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr("cxrfast.training.monitor.RATE_STEPS", (2, 5))
    trainer = make_trainer(tiny_set, tmp_path, epochs=3, limit=48)
    trainer.train_epoch()
    assert caplog.text.count("3 epochs are left, ") == 1
    state = trainer.run.state()
    images, steps = trainer.order.steps * 8, 5
    left = 3 * (images + len(trainer.val_rows) / 3) - steps * 8
    assert state["eta_seconds"] == pytest.approx(left / state["images_per_s"])
    assert state["consumed"] == steps * 8
    trainer.counters.epoch, trainer.counters.consumed = 1, 0
    trainer.train_epoch()
    assert caplog.text.count("are left") == 1


def test_the_time_left_counts_smaller_sizes_by_their_area(tiny_set, tmp_path):
    trainer = make_trainer(tiny_set, tmp_path, scale=64, sizes=((32, 1),), epochs=3, limit=16)
    images, validated = trainer.order.steps * 8, len(trainer.val_rows)
    assert trainer.heartbeat.beat(400.0) == pytest.approx((2.25 * images + validated) / 100.0), (
        "400 small images cost as 100"
    )
    trainer.end_epoch(*trainer.train_epoch())
    state, rate = trainer.run.state(), trainer.run.metrics()[0]["images_per_s"]
    assert (state["epoch"], state["images_per_s"]) == (1, rate)
    assert state["eta_seconds"] == pytest.approx((2 * images + 2 / 3 * validated) / (rate / 4)), (
        "though the next epoch is at the whole scale"
    )


# Decisions


def monitor(minutes: float = 10.0, steps: int | None = None) -> Monitor:
    """Monitor of one rank, at the start of an epoch of 6 steps."""
    made = Monitor(World(torch.device("cpu")), minutes, steps)
    made.start_epoch(6, 0)
    return made


@pytest.mark.parametrize(
    ("given", "saved"),
    [
        ({}, []),
        ({"steps": 2}, [2, 4]),  # not where the epoch ends
        ({"minutes": 1.0}, [3]),  # when the last one is old
    ],
)
def test_a_checkpoint_is_due_after_some_steps_or_minutes_but_not_where_the_epoch_ends(monkeypatch, given, saved):
    now = 0.0
    monkeypatch.setattr("cxrfast.training.monitor.time.monotonic", lambda: now)
    one = monitor(**given)
    for done in range(1, 7):
        now += 25.0
        assert one.after_step(done, 0, False) is (Action.SAVE if done in saved else Action.CONTINUE)
    assert one.after_validation_batch(0) is Action.CONTINUE


def test_early_stopping_counts_epochs_without_a_lower_loss():
    config = TrainConfig(
        set_id="", scale=32, labels=("a",), global_batch=1, micro_batch=1, learning_rate=1, epochs=9, stop_after=2
    )
    counters = Counters()
    for loss, is_last in ((0.9, False), (0.7, False), (0.8, False), (0.6, False), (0.6, False), (0.7, True)):
        counters.add_validation(loss, None)
        counters.next_epoch()
        assert is_over(config, counters) is is_last
    assert is_over(config, Counters(epoch=9))


def test_a_signal_stops_and_a_bad_loss_comes_before_it():
    one = monitor(steps=1)
    assert one.after_step(1, signal.SIGUSR1, False) is Action.STOP
    assert one.signal == signal.SIGUSR1
    assert one.after_step(2, signal.SIGTERM, True) is Action.CHECK
    assert one.after_step(6, signal.SIGTERM, False) is Action.STOP, "also after the last step"
    assert one.after_validation_batch(signal.SIGTERM) is Action.STOP
