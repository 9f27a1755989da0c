"""FormCheck: asks form_process.py whether a form can be used, and ends it when it takes too long."""

from __future__ import annotations

import asyncio
import sys
from collections import OrderedDict

import msgspec

from benthic.serve.form_process import LENGTH_BYTES, Question, Verdict, framed
from benthic.serve.refusal import unavailable, wrong
from benthic.serve.sampling import Form

REMEMBERED = 1024
STARTING_SECONDS = 30.0


class FormCheck:
    """One process at most, started with the first form."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()
        self._known: OrderedDict[Question, str] = OrderedDict()

    async def check(self, form: Form) -> None:
        """Raise Refusal 400 for a form that cannot be compiled, or not in time."""
        question = Question(form.kind, form.text)
        reason = self._known.get(question)
        if reason is None:
            async with self._turn:
                reason = self._known.get(question)  # who had the turn before may have asked the same
                if reason is None:
                    reason = await self._ask(question)
        if reason:
            raise wrong(f"{form.param} cannot be used: {reason[:500]}", form.param, "invalid_schema")

    async def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            process.kill()
            await process.wait()

    async def _ask(self, question: Question) -> str:
        """A verdict, which is remembered, or why there is none, which a busy machine may be to blame for."""
        process = await self._started()
        try:
            async with asyncio.timeout(self._seconds):
                reason = await _exchange(process, question)
        except TimeoutError:
            await self.close()
            return f"it takes more than {self._seconds:g} s to compile"
        except (OSError, EOFError):
            await self.close()
            return "its compilation ended without a result"
        except asyncio.CancelledError:
            await self.close()  # its answer would be taken for that of the next question
            raise
        self._known[question] = reason
        if len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return reason

    async def _started(self) -> asyncio.subprocess.Process:
        """A process that has answered once: its start does not count. Raises Refusal 503 where none starts."""
        if self._process is not None:
            return self._process
        try:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "benthic.serve.form_process"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                start_new_session=True,
            )
            async with asyncio.timeout(STARTING_SECONDS):
                await _exchange(self._process, Question("regex", "a"))
        except (OSError, EOFError) as error:  # TimeoutError is an OSError
            await self.close()
            raise unavailable(f"the compiler of forms did not start: {error!r}", "forms_unavailable") from None
        except asyncio.CancelledError:
            await self.close()
            raise
        return self._process


async def _exchange(process: asyncio.subprocess.Process, question: Question) -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(framed(question))
    await process.stdin.drain()
    head = await process.stdout.readexactly(LENGTH_BYTES)
    content = await process.stdout.readexactly(int.from_bytes(head, "big"))
    return msgspec.msgpack.decode(content, type=Verdict).reason
