"""The probe: an ordinary worker that runs the project's own program and tells what it can reach.

It proves that it ran: only a report that repeats the nonce at its beginning and its end, and has a line for every
target in between, is a `Report`. Everything else is a `ProbeFailed`, which no check may take for "not reachable".
"""

import asyncio
import contextlib
import json
import os
import re
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from blockyard_api.backends.peer import Peer, peer
from blockyard_api.backends.spawner import Spawner, SpawnerRefused
from blockyard_api.backends.worker_socket import SOCKET_NAME
from blockyard_api.checks.result import Result, Severity
from blockyard_api.errors import BlockyardError
from blockyard_api.settings import Endpoint
from blockyard_spawner import protocol

APP = "blockyard_probe"  # in the audit; no app is named so: an app's name has no underscore
_PREFIX = "probe"  # of its worker's id; those of apps are hexadecimal
_END_WITHIN = 2.0  # seconds
_MOST_OUTPUT = 1 << 20  # bytes
_PART = 4000  # characters of one environment variable; the protocol takes 4096
ADVICE = "See what 'user_namespaces' and 'spawner_link' say, and the journal of blockyard-spawner."
_USED_UP = {  # by the refusal: what to widen
    "uid_pool_exhausted": "process.worker_uid_range",
    "network_pool_exhausted": "docker.network_pool",
}
_PARTS = 12  # all together must fit one packet of the protocol


@dataclass(frozen=True, slots=True)
class Target:
    """Something that a worker may try to connect to."""

    words: str  # what it is, for people
    at: Endpoint
    abstract: str = ""  # an abstract Unix socket's name, without the leading NUL
    ping: bool = False  # a Redis that is to be asked something
    gateway: bool = False  # at the host's end of a container's network, on the endpoint's port

    def wire(self) -> dict[str, object]:
        """Describe it to the probe."""
        if self.abstract:
            return {"abstract": self.abstract}
        if self.gateway:
            where: dict[str, object] = {"gateway": True, "port": self.at.port}
        else:
            where = {key: value for key, value in asdict(self.at).items() if value}
        return where | ({"ping": True} if self.ping else {})

    def __str__(self) -> str:
        host = "this host" if self.gateway else self.at.host
        where = f"@{self.abstract}" if self.abstract else self.at.path or f"{host} port {self.at.port}"
        return f"{self.words} ({where})"


@dataclass(frozen=True, slots=True)
class Sight:
    """What became of a connection: `failure` is the error's name, or "" where it was reached."""

    reached: bool
    failure: str
    answer: str  # to a PING


@dataclass(frozen=True, slots=True)
class Report:
    """What the probe told, complete."""

    uid: int  # the spawner's word
    cgroup: str  # the spawner's word; "" where it has none
    peer: Peer  # the kernel's word, seen from the host
    inner_uid: int
    inner_gid: int
    inner_pid: int
    filtered: bool  # whether system calls are filtered at all, be it by the spawner's unit
    typing: str  # the error's name when it typed into a terminal, which our own filter alone answers with EPERM
    landlock: int  # the ABI's version; 0: the kernel has none
    controllers: tuple[str, ...]  # the spawner's word: what it can limit
    sights: dict[Target, Sight] = field(default_factory=dict)

    @property
    def abstract(self) -> Sight:
        """What became of the abstract socket."""
        return next(sight for target, sight in self.sights.items() if target.abstract)


class ProbeFailed(Exception):
    """There is no report. `words` are what the sandbox said last, `code` is the spawner's where it refused."""

    def __init__(self, message: str, *, code: str = "", words: str = "", passing: bool = False) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.words = words
        self.passing = passing
        self.advice = ADVICE

    def result(self, name: str) -> Result:
        """Return what a check says that needed the report: an error, for what was not seen is not safe.

        Only a pool that is all taken is no reason to stay away: so many workers live, and their visitors wait.
        """
        fact = f"Not seen, since the probe did not run: {self.message}"
        if key := _USED_UP.get(self.code):
            return Result(name, Severity.WARNING, fact, f"Widen {key}, then run 'by admin check'.")
        return Result(name, Severity.ERROR, fact, self.advice, self.passing)


class Prober:
    """Starts probes; `running` names those that live now, which belong to somebody.

    `within` is how many seconds one has from the request to its last line, `advice` says where to look when one does
    not run.
    """

    def __init__(self, spawner: Spawner, runtime_dir: str, within: float, advice: str = ADVICE) -> None:
        self._spawner = spawner
        self._runtime_dir = runtime_dir
        self._within = within
        self._advice = advice
        self.running: set[str] = set()

    async def probe(self, targets: Sequence[Target], network: str | None) -> Report:
        """Run one and return its report; when this returns, or raises, nothing of it is left. Raises ProbeFailed."""
        try:
            return await self._probe(targets, network)
        except ProbeFailed as failure:
            failure.advice = self._advice
            raise

    async def _probe(self, targets: Sequence[Target], network: str | None) -> Report:
        worker_id = _PREFIX + secrets.token_hex(12)
        nonce = secrets.token_hex(16)
        request = protocol.Spawn(0, worker_id, "probe", APP, env=_environment(nonce, targets), network=network)
        output = _Output()
        self.running.add(worker_id)
        try:
            async with asyncio.timeout(self._within):
                return await self._run(request, nonce, targets, output)
        except TimeoutError as failure:
            message = f"it did not end within {self._within:g} s."
            raise ProbeFailed(message, words=output.last_words(), passing=True) from failure
        except SpawnerRefused as failure:
            raise ProbeFailed(failure.message, code=failure.code) from failure
        except BlockyardError as failure:
            raise ProbeFailed(failure.message, passing=True) from failure
        finally:
            output.close()
            await asyncio.shield(self._end(worker_id))

    async def _run(self, request: protocol.Spawn, nonce: str, targets: Sequence[Target], output: "_Output") -> Report:
        identity = await self._spawner.hello()
        try:
            spawned = await self._spawner.spawn(request, output.writing)
        finally:
            output.close_writing()
        os.close(spawned.pidfd)
        began = await output.line("began", nonce)
        seen = await asyncio.to_thread(peer, f"{self._runtime_dir}/{request.id}", SOCKET_NAME)
        sights: dict[Target, Sight] = {}
        for index, target in enumerate(targets):
            line = await output.line("target", index)
            sights[target] = Sight(bool(line["reached"]), str(line["failure"]), str(line["answer"]))
        await output.line("ended", nonce)
        return Report(
            uid=spawned.uid,
            cgroup=spawned.cgroup,
            peer=seen,
            inner_uid=int(began["uid"]),
            inner_gid=int(began["gid"]),
            inner_pid=int(began["pid"]),
            filtered=int(began["seccomp"]) == 2,
            typing=str(began["typing"]),
            landlock=int(began["landlock"]),
            controllers=identity.controllers,
            sights=sights,
        )

    async def _end(self, worker_id: str) -> None:
        """End it, whether or not it came to run; what cannot be ended now, the fleet's sweep ends."""
        try:
            with contextlib.suppress(BlockyardError, TimeoutError):
                async with asyncio.timeout(_END_WITHIN):
                    await self._spawner.stop(worker_id, 0)
        finally:
            self.running.discard(worker_id)


class _Output:
    """The probe's log pipe, read line by line; bounded."""

    def __init__(self) -> None:
        self._reading, self.writing = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._reading, False)
        self._text = b""
        self._taken = 0
        self._open = True

    async def line(self, key: str, value: object) -> dict[str, str | int]:
        """Return the next JSON line, which must have this key with this value. Raises ProbeFailed."""
        while True:
            end = self._text.find(b"\n", self._taken)
            if end < 0:
                if not await self._more():
                    words = self.last_words()
                    raise ProbeFailed(
                        f"it ended before its report was complete: {words or 'it said nothing'}", words=words
                    )
                continue
            raw, self._taken = self._text[self._taken : end], end + 1
            try:
                line = json.loads(raw)
            except ValueError:
                continue  # a warning of the sandbox's
            if not isinstance(line, dict) or line.get(key) != value:
                raise ProbeFailed(f"its report is not what was asked for: {raw[:80]!r}.")
            return line

    async def _more(self) -> bool:
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()
        loop.add_reader(self._reading, ready.set)
        try:
            await ready.wait()
        finally:
            loop.remove_reader(self._reading)
        data = os.read(self._reading, 65536)
        self._text += data
        return bool(data) and len(self._text) <= _MOST_OUTPUT

    def last_words(self) -> str:
        """Return the last line that is bubblewrap's own or else the program's, made harmless."""
        lines = [line for line in self._text.decode("utf-8", "replace").splitlines() if line.strip()]
        own = [line for line in lines if line.startswith("bwrap: ")]
        last = (own or [line for line in lines if not line.startswith("{")] or [""])[-1]
        return re.sub(r"[^\x20-\x7e]", "?", last)[:300]

    def close_writing(self) -> None:
        """Leave the pipe to the worker."""
        os.close(self.writing)
        self._open = False

    def close(self) -> None:
        """Be done with it."""
        if self._open:
            self.close_writing()
        os.close(self._reading)


def _environment(nonce: str, targets: Sequence[Target]) -> dict[str, str]:
    text = json.dumps([target.wire() for target in targets], separators=(",", ":"))
    parts = [text[start : start + _PART] for start in range(0, len(text), _PART)]
    if len(parts) > _PARTS:
        raise ProbeFailed("there are more targets than can be told to it.")
    named = {f"BLOCKYARD_PROBE_TARGETS_{number}": part for number, part in enumerate(parts)}
    return {"BLOCKYARD_PROBE_NONCE": nonce, **named}
