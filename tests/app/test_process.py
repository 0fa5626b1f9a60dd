"""The process that holds the model: films that take too long or end it, and what becomes of the next one."""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable

import psutil
import pytest

from cxrfast.app.limits import Refusal
from cxrfast.app.process import ModelProcess
from cxrfast.errors import RunError

SCORES = {"question": "scores"}


def with_model(runs, work: Callable[[ModelProcess], Awaitable[None]], **options) -> None:
    async def go() -> None:
        model = ModelProcess(runs, **options)
        try:
            await work(model)
        finally:
            await model.stop()

    asyncio.run(go())


def test_questions_asked_at_once_get_their_own_answers(runs, film):
    async def work(model: ModelProcess) -> None:
        tasks = [SCORES, {"question": "map", "scale": 64, "finding": 1}, {"question": "pictures"}, SCORES]
        found = await asyncio.gather(*(model.ask(task, film) for task in tasks))
        assert ["findings" in one for one in found] == [True, False, False, True]
        assert found[0] == found[3]
        assert found[1]["side"] == 64
        assert len(found[2]["pictures"]) == 2

    with_model(runs, work)


def test_a_film_that_takes_too_long_is_given_up_and_the_next_one_is_answered(runs, film):
    async def work(model: ModelProcess) -> None:
        await model.start()
        first = model.pid
        model.seconds = 0.001
        with pytest.raises(Refusal, match=r"took longer than 0.001 s and was given up") as caught:
            await model.ask(SCORES, film)
        assert caught.value.status == 504
        assert not psutil.pid_exists(first), "it was killed"
        model.seconds = 60
        assert "findings" in await model.ask(SCORES, film)

    with_model(runs, work)


@pytest.mark.slow
def test_a_film_that_ends_the_process_is_refused_and_the_next_one_is_answered(runs, film):
    async def work(model: ModelProcess) -> None:
        await model.start()
        os.kill(model.pid, signal.SIGSTOP)  # so that the film surely waits
        asked = asyncio.ensure_future(model.ask(SCORES, film))
        await asyncio.sleep(0.1)
        os.kill(model.pid, signal.SIGKILL)
        with pytest.raises(Refusal, match="ended the process that reads it"):
            await asked
        assert "findings" in await model.ask(SCORES, film)

    with_model(runs, work)


def test_a_question_that_nobody_waits_for_is_not_asked(runs, film):
    async def work(model: ModelProcess) -> None:
        async def is_wanted() -> bool:
            return False

        with pytest.raises(Refusal, match="connection ended"):
            await model.ask(SCORES, film, is_wanted)
        assert model.pid is None

    with_model(runs, work)


@pytest.mark.slow
def test_a_question_given_up_leaves_no_answer_behind(runs, film):
    async def work(model: ModelProcess) -> None:
        await model.start()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(model.ask({"question": "pictures"}, film), 0.001)
        assert "findings" in await model.ask(SCORES, film)

    with_model(runs, work)


def test_a_model_that_cannot_be_loaded_is_an_error_with_the_reason(tmp_path):
    (tmp_path / "model.json").write_text("{")

    async def work(model: ModelProcess) -> None:
        with pytest.raises(RunError, match="SHA256SUMS"):
            await model.start()
        assert model.pid is None

    with_model(tmp_path, work)


@pytest.mark.slow
def test_a_model_that_has_gone_is_named_when_it_must_be_loaded_again(tmp_path, film):
    async def work(model: ModelProcess) -> None:
        with pytest.raises(Refusal, match="the model cannot be loaded again: no runs in") as caught:
            await model.ask(SCORES, film)
        assert caught.value.status == 503

    with_model(tmp_path / "gone", work)


@pytest.mark.slow
def test_the_process_ends_with_its_server(runs):
    async def work(model: ModelProcess) -> None:
        await model.start()
        process = psutil.Process(model.pid)
        model._process.stdin.close()  # as when the server is killed
        await asyncio.to_thread(process.wait, 10)
        assert not process.is_running()

    with_model(runs, work)
