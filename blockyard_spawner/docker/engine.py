"""The container engine's socket, asked in bounded calls; each failure becomes a sentence that says what to do."""

import asyncio
import contextlib
import functools
import json
import re
import struct
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from datetime import datetime
from typing import Any

import aiohttp
from aiodocker import Docker
from aiodocker.exceptions import DockerError

from blockyard_spawner.protocol import Refused

_WITHIN = 10.0  # seconds for one call: a start takes less than one
_NO_CONNECTION = 900  # aiodocker's number for it
_HEADER = struct.Struct(">BxxxL")  # of a frame of output: which stream, how long
_ITS_OWN = 3  # the stream in which the engine tells what went wrong with the others, without a time
_AT_ONCE = 32 << 10  # bytes of output that are taken in one piece of work: a few milliseconds of it
_LONGEST = 1 << 20  # bytes of a frame that are kept: the engines that we know cut an app's lines into far less
_LARGEST = 64 << 20  # bytes of an answer: thousands of containers are described in a tenth of it
_OWED = 0.001  # seconds that may be left for later: the loop has no shorter pauses
_TIME = re.compile(rb"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:\d\d) ")


class EngineRefused(Refused):
    """The engine answered with an error; `status` is its own, as of HTTP."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__("docker_refused", f"The container engine refused; see its log: {message.strip():.600}")
        self.status = status


class Engine:
    """One engine: Docker, or Podman's service of the same interface."""

    def __init__(self, docker: Docker, path: str) -> None:
        self._docker, self._path, self.turns = docker, path, Turns()

    async def info(self) -> dict[str, Any]:
        """Describe the engine: its runtimes, what limits it can set, which log drivers it has."""
        found: dict[str, Any] = await self._ask("GET", "info")
        return found

    async def create(self, name: str, description: Mapping[str, Any]) -> str:
        """Make a container without starting it; return its id."""
        image = description["Image"]
        try:
            made = await self._ask("POST", "containers/create", description, name=name)
        except EngineRefused as error:
            if error.status == 404:
                advice = (
                    f"Make {image} with scripts/build-worker-image, or correct docker.image: the engine has no such"
                )
                raise Refused("no_image", f"{advice} image.") from error
            raise
        return str(made["Id"])

    async def start(self, container: str) -> None:
        """Start a container. Raises Refused ``exec_failed`` where its program or its runtime cannot."""
        try:
            await self._ask("POST", f"containers/{container}/start")
        except EngineRefused as error:
            raise Refused("exec_failed", f"Check image and runtime; {error.message}") from error

    async def show(self, container: str) -> dict[str, Any]:
        """Return all that the engine knows of a container."""
        found: dict[str, Any] = await self._ask("GET", f"containers/{container}/json")
        return found

    async def kill(self, container: str, name: str) -> None:
        """Send a signal to a container's first process."""
        await self._ask("POST", f"containers/{container}/kill", signal=name)

    async def wait(self, container: str, within: float = _WITHIN) -> None:
        """Wait until a container does not run, for so many seconds."""
        await self._ask("POST", f"containers/{container}/wait", within=within)

    async def containers(self, *labels: str) -> list[dict[str, Any]]:
        """List the containers, running or not, that have all of these labels."""
        filters = json.dumps({"label": list(labels)})
        found: list[dict[str, Any]] = await self._ask("GET", "containers/json", all="1", filters=filters)
        return found

    async def remove(self, container: str) -> None:
        """Kill and remove a container with its anonymous volumes; one that is not there is no error."""
        with _absent():
            await self._ask("DELETE", f"containers/{container}", force="1", v="1")

    async def create_network(self, description: Mapping[str, Any]) -> str:
        """Make a network; return its id."""
        return str((await self._ask("POST", "networks/create", description))["Id"])

    async def network(self, name: str) -> dict[str, Any]:
        """Return all that the engine knows of a network."""
        found: dict[str, Any] = await self._ask("GET", f"networks/{name}")
        return found

    async def networks(self) -> list[dict[str, Any]]:
        """List all networks of the engine, also those of others."""
        found: list[dict[str, Any]] = await self._ask("GET", "networks")
        return found

    async def connect(self, network: str, container: str, alias: str) -> None:
        """Connect a container to a network, where `alias` is its name."""
        await self._ask(
            "POST",
            f"networks/{network}/connect",
            {"Container": container, "EndpointConfig": {"Aliases": [alias]}},
        )

    async def remove_network(self, network: str) -> None:
        """Remove a network, whoever is connected to it; one that is not there is no error."""
        with _absent():
            for container in (await self.network(network)).get("Containers") or {}:
                with _absent():
                    parting = {"Container": container, "Force": True}
                    await self._ask("POST", f"networks/{network}/disconnect", parting)
            await self._ask("DELETE", f"networks/{network}")

    @contextlib.asynccontextmanager
    async def output(self, container: str, since: str) -> AsyncIterator["Output"]:
        """Read what a container writes, from a time on until it ends."""
        asked = {"stdout": "1", "stderr": "1", "follow": "1", "timestamps": "1", "since": since}
        async with self._stream(f"containers/{container}/logs", asked) as content:
            yield Output(content)

    async def events(self, event: str, label: str) -> AsyncIterator[str]:
        """Yield the ids of containers with this label to which an event happens."""
        filters = json.dumps({"event": [event], "label": [label], "type": ["container"]})
        async with self._stream("events", {"filters": filters}) as content:
            held = b""
            while data := await content.readany():
                *lines, held = (held + data).split(b"\n")
                for line in lines:
                    yield _subject(line)
                held = held[:_LONGEST]  # of a longer one not even the rest is kept: it is none

    async def _ask(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, within: float = _WITHIN, **query: str
    ) -> Any:  # noqa: ANN401 - JSON
        bound = aiohttp.ClientTimeout(total=within)
        with self._asking(within):
            async with asyncio.timeout(within):
                await self._docker._check_version()  # the library has no other name for it
                address = f"{self._docker.docker_host}/{self._docker.api_version}/{path}"
                async with self._docker.session.request(
                    method, address, json=body, params=query, timeout=bound
                ) as answer:
                    return await _content(answer)

    @contextlib.asynccontextmanager
    async def _stream(self, path: str, query: Mapping[str, str]) -> AsyncIterator[aiohttp.StreamReader]:
        unbounded = aiohttp.ClientTimeout(total=None, sock_connect=_WITHIN)
        with self._asking():
            await asyncio.wait_for(self._docker._check_version(), _WITHIN)
            address = f"{self._docker.docker_host}/{self._docker.api_version}/{path}"
            async with self._docker.session.get(address, params=query, timeout=unbounded) as answer:
                if answer.status >= 400:
                    async with asyncio.timeout(_WITHIN):
                        await _content(answer)
                yield answer.content

    @contextlib.contextmanager
    def _asking(self, within: float = _WITHIN) -> Iterator[None]:
        try:
            yield
        except TimeoutError as error:
            raise Refused("docker_slow", f"See to the container engine: no answer within {within:.0f} s.") from error
        except (DockerError, aiohttp.ClientError, asyncio.IncompleteReadError) as error:
            if isinstance(error, DockerError) and error.status != _NO_CONNECTION:
                raise EngineRefused(error.status, error.message) from error
            cause = error.__context__ if isinstance(error, DockerError) else error
            reason = cause.os_error if isinstance(cause, aiohttp.ClientConnectorError) else cause
            if isinstance(reason, PermissionError):
                advice = f"Let the user blockyard-docker use {self._path}: put it into the socket's group"
                raise Refused("docker_denied", f"{advice} and restart blockyard-spawner-docker.") from error
            why = getattr(reason, "strerror", None) or "it hung up"
            raise Refused("docker_unreachable", f"Start the container engine: {self._path}: {why}.") from error


class Turns:
    """Whoever has a container's output to move does it in turn, and then leaves the loop to others for as long.

    So what all of them write, however much and however many they are, takes half of the loop's time at most, and what
    else there is to do waits for one piece of that work.
    """

    def __init__(self) -> None:
        self._one_by_one, self._owed = asyncio.Lock(), 0.0

    @contextlib.asynccontextmanager
    async def take(self) -> AsyncIterator[None]:
        """Do some work, without waiting for anything, when it is one's turn."""
        async with self._one_by_one:
            began = time.monotonic()
            yield
            self._owed += time.monotonic() - began
            if self._owed > _OWED:
                pause, self._owed = self._owed, 0.0
                await asyncio.sleep(pause)


class Output:
    """What a container writes, as the engine sends it: frames, as many of them in a packet as there are."""

    def __init__(self, content: aiohttp.StreamReader) -> None:
        self._content, self._held, self._surplus = content, b"", 0

    async def more(self, patience: float | None) -> bool:
        """Wait for something to take apart, or for so many seconds; False at the end."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                data = await self._content.read(_AT_ONCE)
            if not data and self._held:
                raise asyncio.IncompleteReadError(self._held, None)
            self._held += data
            return bool(data)
        return True

    def pieces(self) -> list[tuple[str, bytes]]:
        """Return what has come, each piece with its time.

        Times are ``seconds.nanoseconds``, and compare as text until the year 2286.
        """
        found, held, at = [], self._held, 0
        while True:
            skipped = min(self._surplus, len(held) - at)
            at, self._surplus = at + skipped, self._surplus - skipped
            if len(held) - at < _HEADER.size:
                break
            stream, length = _HEADER.unpack_from(held, at)
            kept = min(length, _LONGEST)
            end = at + _HEADER.size + kept
            if end > len(held):
                break
            if stream != _ITS_OWN and (begin := _TIME.match(held, at + _HEADER.size, end)):
                second, fraction, zone = begin.groups(b"0")
                if (known := _second(second + zone)) is not None:
                    found.append((f"{known}.{fraction.decode().ljust(9, '0')}", held[begin.end() : end]))
            at, self._surplus = end, length - kept
        self._held = held[at:]
        return found


@contextlib.asynccontextmanager
async def connected(path: str) -> AsyncIterator[Engine]:
    """Use the engine at a Unix socket; nothing is asked of it yet."""
    # Without a limit: each running worker's output takes a connection.
    connector = aiohttp.UnixConnector(path, limit=0)
    bound = aiohttp.ClientTimeout(total=_WITHIN)
    async with Docker("unix://localhost", connector=connector, timeout=bound) as docker:  # the connector has the path
        try:
            yield Engine(docker, path)
        finally:
            await connector.close()


async def _content(answer: aiohttp.ClientResponse) -> Any:  # noqa: ANN401 - JSON
    body = bytearray()
    async for data in answer.content.iter_any():
        body += data
        if len(body) > _LARGEST:
            raise EngineRefused(answer.status, f"its answer is longer than {_LARGEST >> 20} MB")
    text = body.decode(errors="replace")
    with contextlib.suppress(ValueError):
        found = json.loads(text) if text else None
        if answer.status >= 400:
            raise EngineRefused(answer.status, str(found.get("message", text) if isinstance(found, dict) else text))
        return found
    raise EngineRefused(answer.status, text)


def _subject(event: bytes) -> str:
    """Name the container that an event is about; "" where it does not say."""
    try:
        happened = json.loads(event)
        return str(happened.get("id") or happened["Actor"]["ID"])
    except (ValueError, LookupError, TypeError, AttributeError):
        return ""


@functools.lru_cache(maxsize=64)
def _second(moment: bytes) -> int | None:
    """Turn RFC 3339 without a fraction, of any zone, into seconds; what is no time into None. Many lines share one."""
    try:
        return int(datetime.fromisoformat(moment.decode()).timestamp())
    except ValueError:
        return None


@contextlib.contextmanager
def _absent() -> Iterator[None]:
    try:
        yield
    except EngineRefused as error:
        if error.status != 404:
            raise
