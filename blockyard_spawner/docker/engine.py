"""The container engine's socket, asked in bounded calls; each failure becomes a sentence that says what to do."""

import asyncio
import contextlib
import json
import re
import struct
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


class EngineRefused(Refused):
    """The engine answered with an error; `status` is its own, as of HTTP."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__("docker_refused", f"The container engine refused; see its log: {message.strip():.600}")
        self.status = status


class Engine:
    """One engine: Docker, or Podman's service of the same interface."""

    def __init__(self, docker: Docker, path: str) -> None:
        self._docker, self._path = docker, path

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

    async def wait(self, container: str) -> None:
        """Wait until a container does not run."""
        await self._ask("POST", f"containers/{container}/wait")

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

    async def output(self, container: str, since: str) -> AsyncIterator[tuple[str, bytes]]:
        """Yield what a container writes, from a time on until it ends, each piece with its time.

        Times are ``seconds.nanoseconds``, and compare as text until the year 2286.
        """
        asked = {"stdout": "1", "stderr": "1", "follow": "1", "timestamps": "1", "since": since}
        async with self._stream(f"containers/{container}/logs", asked) as content:
            while header := await content.read(_HEADER.size):
                if len(header) < _HEADER.size:
                    header += await content.readexactly(_HEADER.size - len(header))
                stream, length = _HEADER.unpack(header)
                moment, _, data = (await content.readexactly(length)).partition(b" ")
                if stream != _ITS_OWN and (known := _instant(moment.decode(errors="replace"))):
                    yield known, data

    async def events(self, event: str, label: str) -> AsyncIterator[str]:
        """Yield the ids of containers with this label to which an event happens."""
        filters = json.dumps({"event": [event], "label": [label], "type": ["container"]})
        async with self._stream("events", {"filters": filters}) as content:
            while line := await content.readline():
                happened = json.loads(line)
                yield str(happened.get("id") or happened["Actor"]["ID"])

    async def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None, **query: str) -> Any:  # noqa: ANN401 - JSON
        with self._asking():
            async with asyncio.timeout(_WITHIN):
                await self._docker._check_version()  # the library has no other name for it
                address = f"{self._docker.docker_host}/{self._docker.api_version}/{path}"
                async with self._docker.session.request(method, address, json=body, params=query) as answer:
                    return await _content(answer)

    @contextlib.asynccontextmanager
    async def _stream(self, path: str, query: Mapping[str, str]) -> AsyncIterator[aiohttp.StreamReader]:
        unbounded = aiohttp.ClientTimeout(total=None, sock_connect=_WITHIN)
        with self._asking():
            await asyncio.wait_for(self._docker._check_version(), _WITHIN)
            address = f"{self._docker.docker_host}/{self._docker.api_version}/{path}"
            async with self._docker.session.get(address, params=query, timeout=unbounded) as answer:
                if answer.status >= 400:
                    await _content(answer)
                yield answer.content

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        try:
            yield
        except TimeoutError as error:
            raise Refused("docker_slow", f"See to the container engine: no answer within {_WITHIN:.0f} s.") from error
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
    text = await answer.text(errors="replace")
    with contextlib.suppress(ValueError):
        found = json.loads(text) if text else None
        if answer.status >= 400:
            raise EngineRefused(answer.status, str(found["message"] if isinstance(found, dict) else text))
        return found
    raise EngineRefused(answer.status, text)


def _instant(moment: str) -> str:
    """Turn RFC 3339, up to nanoseconds and of any zone, into ``seconds.nanoseconds``; what is no time into nothing."""
    try:
        whole = datetime.fromisoformat(moment)
    except ValueError:
        return ""
    fraction = re.search(r"\.(\d{1,9})", moment)
    return f"{int(whole.timestamp())}.{fraction[1] if fraction else '':0<9}"


@contextlib.contextmanager
def _absent() -> Iterator[None]:
    try:
        yield
    except EngineRefused as error:
        if error.status != 404:
            raise
