"""Which of several workers made a page: below /session/ its path has a token that only that worker knows.

Shiny tells a page its token over the WebSocket, into which the relay does not look. But a worker answers such a path
with 400 where it knows the token and nothing follows it, and with 404 where it does not (R/shiny.R, `handleRequest`).
"""

import asyncio
import re
from collections.abc import Sequence

from blockyard_api.errors import TooMany
from blockyard_api.relay.gate import UpstreamError
from blockyard_api.workers.readiness import status
from blockyard_api.workers.worker import Worker

_PATH = re.compile(rb"/session/([A-Za-z0-9]{1,64})/")
_KNOWN = b"400"
_WITHIN = 10.0  # seconds: R answers nobody while it computes
_AT_ONCE = 16  # questions of one session: they take no place at a worker, and a token is easily invented
_KEPT = 32  # pages that one visitor has open at once, while there are several bundles of an app


def token_of(rest: bytes) -> bytes | None:
    """Return the token in an app's own path, if it has one."""
    return found[1] if (found := _PATH.match(rest)) else None


class Issuers:
    """The workers that made one visitor's pages, by the pages' tokens, as far as they had to be asked."""

    __slots__ = ("_known", "_questions")

    def __init__(self) -> None:
        self._known: dict[bytes, Worker] = {}
        self._questions: dict[bytes, asyncio.Future[bool]] = {}  # whether it was answered

    def known(self, token: bytes) -> Worker | None:
        """Return the worker that made a page, if it was asked before."""
        return self._known.get(token)

    async def ask(self, token: bytes, workers: Sequence[Worker]) -> Worker | None:
        """Return which of the workers made a page, None if that is not to be found out. Raises TooMany."""
        while (question := self._questions.get(token)) is not None:  # a page fetches many parts of itself at once
            if await asyncio.shield(question):
                return self._known.get(token)
        if len(self._questions) >= _AT_ONCE:
            raise TooMany("too_many_requests", "Your pages ask for too much at once; try again.", 1)
        question = self._questions[token] = asyncio.get_running_loop().create_future()
        answered = False
        try:
            worker = await _ask(token, workers)
            if worker is not None:
                while len(self._known) >= _KEPT:
                    del self._known[next(iter(self._known))]
                self._known[token] = worker
            answered = True
        finally:
            del self._questions[token]
            question.set_result(answered)
        return worker


async def _ask(token: bytes, workers: Sequence[Worker]) -> Worker | None:
    """Ask all of the workers at once; return the one that knows the token, or the only one that was too busy to say."""
    questions = {asyncio.create_task(_answer(worker, token)): worker for worker in workers}
    pending = set(questions)
    try:
        while pending:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            if known := [questions[question] for question in done if question.result() == _KNOWN]:
                return known[0]
    finally:
        for question in pending:
            question.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
    silent = [worker for question, worker in questions.items() if question.result() is None]
    return silent[0] if len(silent) == 1 else None


async def _answer(worker: Worker, token: bytes) -> bytes | None:
    """Return a worker's status for a token, b"" where it has none to give, None if it did not answer in time."""
    try:
        async with asyncio.timeout(_WITHIN):
            return await status(worker.upstream, b"/session/%b/" % token) or b""
    except TimeoutError:
        return None
    except UpstreamError:
        return b""
