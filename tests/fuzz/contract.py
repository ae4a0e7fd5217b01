"""The control plane held against its own OpenAPI document, over TCP: an administrator, a guest, a guesser, nobody."""

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

from fake_spawner import FakeSpawner
from running_control import Control
from sqlalchemy import insert

from blockyard_api.http.server import server
from blockyard_api.store import migrate
from blockyard_api.store.tables import users

_CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]
_LAST = {("DELETE", "/api/v1/users/me/tokens")}  # would end the caller's own token
_OURS = "plain"


@schemathesis.serializer("application/gzip")
def _as_it_is(_context: object, value: object) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode("utf-8", "replace")


class Live:
    """A daemon with a fake spawner and a real listener, in a thread of its own."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="by-fuzz-"))
        self.url = self.token = self.guest = ""
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
        docker = FakeSpawner(self.directory / "d.sock", self.directory / "run")  # or apps could not be moved there
        docker.start()
        lines = f'docker.spawner_socket = "{docker.path}"\ndocker.runtime_dir = "{docker.runtime_dir}"'
        # a run of the start-up checks takes all of its time here: there is no probe to answer
        control = await Control(template, f'{lines}\nserver.preflight_timeout = "1s"').start()
        try:
            await control.app(_OURS)
            _, self.token = await control.services.tokens.create("admin", "fuzz")
            async with control.services.database.begin() as connection:
                await connection.execute(insert(users).values(sub="guest", role="viewer", created_at=0))
            _, self.guest = await control.services.tokens.create("guest", "fuzz")
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
            await docker.close()


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
    """Every route, sound and unsound input, whoever calls: no 5xx, no traceback, statuses and shapes as told.

    What an operation may answer is named in single statuses, of which many are seen; that all of them come about is
    for the tests of the document, which bring about one after the other.
    """
    journal, chance = _Journal(), random.Random(seed)
    logging.getLogger().addHandler(journal)
    count = 0
    seen: dict[str, set[str]] = {}
    try:
        with live() as daemon:
            schema = schemathesis.openapi.from_url(f"{daemon.url}/openapi.json")
            operations = [result.ok() for result in schema.get_all_operations()]
            assert len(operations) > 20, operations
            told = {operation.label: {*operation.definition.raw["responses"]} for operation in operations}
            assert all(status.isdecimal() for each in told.values() for status in each), told  # no range, no default
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
                        statuses = _sweep(operation, cases, daemon, session, chance)
                        count += len(statuses)
                        seen.setdefault(operation.label, set()).update(statuses)
                    rounds += 1
            for label, statuses in told.items():
                assert seen[label], f"{label} was not asked"
                assert seen[label] <= statuses, label
                assert not {"401", "429"} & statuses or {"401", "429"} & seen[label], label
            assert requests.get(f"{daemon.url}/healthz", timeout=10).text == "ok"
        assert not journal.entries, "\n".join(journal.entries[:3])
    finally:
        logging.getLogger().removeHandler(journal)
    some, named = (sum(map(len, each.values())) for each in (seen, told))
    return f"{count} requests to {len(operations)} routes, {rounds} rounds, {some} of {named} statuses seen"


def _sweep(operation, cases, daemon: Live, session: requests.Session, chance: random.Random) -> list[str]:
    """Ask one operation some things, each on behalf of everybody; return the statuses of the answers."""
    statuses: list[str] = []
    known = chance.random() < 0.6
    callers = [{"Authorization": f"Bearer {token}"} for token in (daemon.token, daemon.guest, "by_wrong")] + [{}]
    if known:  # it may have been deleted, or be hidden from the guest
        apps = f"{daemon.url}/api/v1/apps"
        session.post(apps, json={"name": _OURS}, headers=callers[0], timeout=20)
        session.patch(f"{apps}/{_OURS}", json={"access_type": "public"}, headers=callers[0], timeout=20)

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
        if known and "id" in case.path_parameters:
            case.path_parameters["id"] = _OURS
        last = (case.method.upper(), operation.path) in _LAST
        for headers in callers[2:] if last else callers:
            if operation.path.endswith("/logs"):
                case.query = {**(case.query or {}), "stream": "false"}
            case.headers.pop("Authorization", None)
            response = case.call(base_url=daemon.url, session=session, headers=headers, timeout=20)
            statuses.append(str(response.status_code))
            assert "Traceback" not in response.text
            case.validate_response(response, checks=_CHECKS)
            if response.status_code >= 400 and operation.path != "/readyz":
                assert set(response.json()) == {"error", "message"}, response.text

    with contextlib.suppress(Unsatisfiable):  # nothing is unsound where nothing can be said
        ask()
    return statuses
