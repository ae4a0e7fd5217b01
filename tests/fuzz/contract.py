"""The control plane held against its own OpenAPI document, over TCP, with a token and without."""

import asyncio
import contextlib
import logging
import random
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import requests
import schemathesis
from hypothesis import HealthCheck, Phase
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks

sys.path.append(str(Path(__file__).parents[1] / "unit" / "api"))

from running_control import Control

from blockyard_api.http.server import server
from blockyard_api.store import migrate

_CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]
_LAST = {("DELETE", "/api/v1/users/me/tokens")}  # would end the administrator's own token
_OURS = "plain"


@schemathesis.serializer("application/gzip")
def _as_it_is(_context: object, value: object) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode("utf-8", "replace")


class Live:
    """A daemon with a fake spawner and a real listener, in a thread of its own."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="by-fuzz-"))
        self.url = self.token = ""
        self._up = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Return when it answers."""
        self._thread.start()
        assert self._up.wait(60), self._failure
        assert not self._failure, self._failure

    def stop(self) -> None:
        """End it; raise what took it down."""
        self._loop.call_soon_threadsafe(self._leave.set)
        self._thread.join(60)
        shutil.rmtree(self.directory)
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        except BaseException as error:  # noqa: BLE001 - it is raised by `stop`
            self._failure = error
        finally:
            self._up.set()

    async def _serve(self) -> None:
        self._leave = asyncio.Event()
        template = self.directory / "blockyard.db"
        await asyncio.to_thread(migrate.upgrade, template)
        control = await Control(template).start()
        try:
            await control.app(_OURS)
            _, self.token = await control.services.tokens.create("admin", "fuzz")
            sock = socket.create_server(("127.0.0.1", 0))
            serving = server(control.asgi, 1, control.services.streams.stop)
            task = asyncio.create_task(serving.serve(sockets=[sock]))
            self.url = f"http://127.0.0.1:{sock.getsockname()[1]}"
            self._up.set()
            leaving = asyncio.create_task(self._leave.wait())
            await asyncio.wait([leaving, task], return_when=asyncio.FIRST_COMPLETED)
            assert control.alive, "the daemon has ended"
            serving.should_exit = True
            await task
        finally:
            await control.close()


@contextlib.contextmanager
def live() -> Iterator[Live]:
    """Start a daemon; end it."""
    running = Live()
    running.start()
    try:
        yield running
    finally:
        running.stop()


class _Journal(logging.Handler):
    """What would be a traceback in the journal."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.entries: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.entries.append(self.format(record))


def openapi(seconds: float, seed: int) -> str:
    """Every route, sound and unsound input, an administrator and a stranger: no 5xx, no traceback, shapes as told."""
    journal, chance = _Journal(), random.Random(seed)
    logging.getLogger().addHandler(journal)
    count, asked = 0, set()
    try:
        with live() as daemon:
            schema = schemathesis.openapi.from_url(f"{daemon.url}/openapi.json")
            operations = [result.ok() for result in schema.get_all_operations()]
            assert len(operations) > 20, operations
            ways = [
                (operation, operation.as_strategy(generation_mode=mode))
                for operation in operations
                for mode in GenerationMode
            ]
            with requests.Session() as session:
                end = time.monotonic() + seconds
                rounds = 0
                while time.monotonic() < end or not rounds:  # one round at least, however slow the machine
                    chance.shuffle(ways)
                    for operation, cases in ways:
                        if time.monotonic() > end and rounds:
                            break
                        count += (some := _sweep(operation, cases, daemon, session, chance))
                        asked |= {operation.label} if some else set()
                    rounds += 1
            assert asked == {operation.label for operation in operations}
            assert requests.get(f"{daemon.url}/healthz", timeout=10).text == "ok"
        assert not journal.entries, "\n".join(journal.entries[:3])
    finally:
        logging.getLogger().removeHandler(journal)
    return f"{count} requests to {len(operations)} routes, {rounds} rounds"


def _sweep(operation, cases, daemon: Live, session: requests.Session, chance: random.Random) -> int:
    count = 0
    known = chance.random() < 0.6

    @hypothesis.seed(chance.randrange(2**64))
    @hypothesis.settings(
        max_examples=3,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @hypothesis.given(cases)
    def ask(case) -> None:
        nonlocal count
        count += 1
        if known and "id" in case.path_parameters:
            case.path_parameters["id"] = _OURS
        last = (case.method.upper(), operation.path) in _LAST
        for headers in ({"Authorization": f"Bearer {daemon.token}"}, {}):
            if headers and last:
                continue
            if operation.path.endswith("/logs"):
                case.query = {**(case.query or {}), "stream": "false"}
            case.headers.pop("Authorization", None)
            response = case.call(base_url=daemon.url, session=session, headers=headers, timeout=20)
            assert "Traceback" not in response.text
            case.validate_response(response, checks=_CHECKS)
            if response.status_code >= 400 and operation.path != "/readyz":
                assert set(response.json()) == {"error", "message"}, response.text

    with contextlib.suppress(Unsatisfiable):  # nothing is unsound where nothing can be said
        ask()
    return count
