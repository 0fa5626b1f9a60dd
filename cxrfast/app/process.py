"""The process that holds the model, seen from the server: asked one film at a time, killed when one takes too long.

A film that crashes its decoder or fills the memory ends that process alone; the next film gets a new one. Imports no torch.
"""

import asyncio
import json
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from cxrfast.app.limits import Refusal
from cxrfast.errors import RunError

LENGTH = 8
"""Bytes of the length in front of each message, big endian. A request is two messages, JSON and a film; an answer is one."""

PIECE = 2**20
"""Bytes written at once."""

MODULE = "cxrfast.app.worker"


class ModelProcess:
    """A model loaded from `folder` onto `device` in its own process. Methods belong to one event loop.

    `shards`: where the shard set of a folder of runs is now. `seconds`: at most, for one film.
    """

    def __init__(self, folder: Path, device: str = "cpu", seconds: float = 120, shards: Path | None = None) -> None:
        self.folder, self.device, self.seconds, self.shards = folder, device, seconds, shards
        self.about: dict[str, Any] = {}
        """What the model says about itself (`worker.about`), once it is loaded."""
        self._process: Process | None = None
        self._one_at_a_time = asyncio.Lock()

    @property
    def pid(self) -> int | None:
        """Id of the process; None while there is none."""
        return self._process.pid if self._process else None

    async def start(self) -> None:
        """Load the model, unless it is loaded. Raises RunError with the reason if it cannot be."""
        if self._process and self._process.returncode is None:
            return
        await self.stop()
        command = ["-m", MODULE, str(self.folder), self.device, *([str(self.shards)] if self.shards else [])]
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, *command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, start_new_session=True
        )  # a session of its own: Ctrl-C is for the server, which ends it
        try:
            first = await self._receive()
        except (asyncio.IncompleteReadError, OSError):
            code = await self._process.wait()
            raise RunError(f"{self.folder}: the process that loads the model died (exit code {code})") from None
        if "error" in first:
            await self.stop()
            raise RunError(first["error"])
        self.about = first

    async def ask(
        self, task: dict[str, Any], film: bytes, is_wanted: Callable[[], Awaitable[bool]] | None = None
    ) -> dict[str, Any]:
        """What the model answers. `task`: see `worker.answer`. `is_wanted` is asked when the film's turn has come.

        Raises Refusal if the film cannot be used, takes more than `seconds`, or ends the process.
        """
        async with self._one_at_a_time:
            if is_wanted and not await is_wanted():
                raise Refusal(400, "the connection ended before the film's turn")
            try:
                await self.start()
            except RunError as error:
                raise Refusal(503, f"the model cannot be loaded again: {error}") from error
            try:
                async with asyncio.timeout(self.seconds):
                    await self._send(json.dumps(task).encode(), film)
                    answer = await self._receive()
            except TimeoutError:
                await self.stop()
                raise Refusal(504, f"this film took longer than {self.seconds:g} s and was given up") from None
            except (asyncio.IncompleteReadError, OSError):
                await self.stop()
                raise Refusal(
                    422, "this film ended the process that reads it: it is damaged, or memory ran out"
                ) from None
            except asyncio.CancelledError:
                await self.stop()  # else its answer would be taken for the next film's
                raise
        if "error" in answer:
            raise Refusal(answer["status"], answer["error"])
        return answer

    async def stop(self) -> None:
        """End the process, whatever it does."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.returncode is None:
            process.kill()
        await process.wait()

    async def _send(self, *messages: bytes) -> None:
        assert self._process is not None
        pipe = self._process.stdin
        assert pipe is not None
        for message in messages:
            pipe.write(len(message).to_bytes(LENGTH))
            for start in range(0, len(message), PIECE):  # a whole film would be copied
                pipe.write(memoryview(message)[start : start + PIECE])
                await pipe.drain()

    async def _receive(self) -> dict[str, Any]:
        assert self._process is not None
        pipe = self._process.stdout
        assert pipe is not None
        length = int.from_bytes(await pipe.readexactly(LENGTH))
        return json.loads(await pipe.readexactly(length))
