"""Asynchronous client of a spawner: numbered requests over one SEQPACKET connection, made anew when it breaks."""

import array
import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from blockyard_api.errors import BlockyardError, Unavailable
from blockyard_spawner import protocol

_LISTENS_WITHIN = 30  # tenths of a second after it was revived
_REPLY_WITHIN = 15.0  # seconds: a spawn is answered within milliseconds, a stop within its grace and this


class SpawnerUnreachable(Unavailable):
    """There is no spawner behind the socket, or it went away before it answered."""

    def __init__(self, detail: str) -> None:
        super().__init__(
            "spawner_unreachable",
            f"The spawner cannot be reached ({detail}); see 'systemctl status blockyard-spawner', or for Docker apps "
            "'systemctl status blockyard-spawner-docker.socket'.",
            retry_after=5,
        )


class SpawnerRefused(Unavailable):
    """The spawner refused; `code` is its own."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What the spawner said about itself at the version exchange."""

    version: int
    unprivileged: bool
    controllers: tuple[str, ...]
    uids_free: int
    uids_total: int


@dataclass(frozen=True, slots=True)
class Result:
    """How a worker ended, as the spawner saw it."""

    reason: str
    status: int | None = None
    signal: int | None = None
    oom_kills: int = 0


@dataclass(frozen=True, slots=True)
class Spawned:
    """A started worker; `pidfd` becomes readable when it ends, and is the caller's to close."""

    id: str
    uid: int
    cgroup: str
    pidfd: int


@dataclass(frozen=True, slots=True)
class Listed:
    """A worker that the spawner knows."""

    id: str
    app: str
    uid: int
    cgroup: str
    state: str
    result: Result | None


class _Connection:
    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.waiting: dict[int, asyncio.Future[tuple[dict[str, Any], int | None]]] = {}

    @property
    def closed(self) -> bool:
        """Whether it is of no further use."""
        return self.sock.fileno() < 0

    def read(self) -> None:
        """Take one reply; raises OSError or what `unpack` raises when the connection is of no further use."""
        space = socket.CMSG_LEN(array.array("i").itemsize)  # CMSG_SPACE would leave room for two
        packet, ancillary, flags, _ = self.sock.recvmsg(protocol.MAX_PACKET, space, socket.MSG_CMSG_CLOEXEC)
        numbers = array.array("i")
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
        descriptor = numbers[0] if numbers else None
        try:
            if not packet or flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise ConnectionResetError("connection closed")
            message = protocol.unpack(packet)
            seq = message.get("seq")
            if type(seq) is not int:
                raise ValueError("a reply without a number")
            waiter = self.waiting.pop(seq, None)
            if waiter and not waiter.done():
                waiter.set_result((message, descriptor))
                descriptor = None
        finally:
            _close(descriptor)

    def fail(self, detail: str) -> None:
        """Close, and tell everybody who waits; once is enough."""
        if not self.closed:
            asyncio.get_running_loop().remove_reader(self.sock)
            self.sock.close()
        for waiter in self.waiting.values():
            if not waiter.done():
                waiter.set_exception(SpawnerUnreachable(detail))
        self.waiting.clear()


class Spawner:
    """One spawner. `revive` is asked once a failed connection to start it again; it tells whether that is under way."""

    def __init__(self, path: str, revive: Callable[[], Awaitable[bool]]) -> None:
        self._path = path
        self._revive = revive
        self._connection: _Connection | None = None
        self._connecting = asyncio.Lock()
        self._greeting = asyncio.Lock()  # whoever asks how things are costs the spawner one connection at a time
        self._next = 0

    async def spawn(self, request: protocol.Spawn, log: int) -> Spawned:
        """Start a worker; `log` is the write end of its log pipe and stays the caller's.

        Raises SpawnerRefused or SpawnerUnreachable.
        """
        reply, pidfd = await self._call(request, _REPLY_WITHIN, log)
        if pidfd is None:
            raise SpawnerUnreachable("its reply came without a pidfd")
        try:
            with _understanding():
                return Spawned(request.id, int(reply["uid"]), str(reply["cgroup"]), pidfd)
        except SpawnerUnreachable:
            os.close(pidfd)
            raise

    async def stop(self, worker_id: str, grace: float) -> Result:
        """End a worker after `grace` seconds and return how it ended; returns when nothing of it is left."""
        milliseconds = min(round(grace * 1000), protocol.MAX_GRACE_MS)
        reply, _ = await self._call(protocol.Stop(0, worker_id, milliseconds), grace + _REPLY_WITHIN)
        with _understanding():
            return _result(reply["result"])

    async def list(self) -> list[Listed]:
        """Name all workers, running and lately ended."""
        found: list[Listed] = []
        more = True
        while more:
            reply, _ = await self._call(protocol.List(0, after=found[-1].id if found else None), _REPLY_WITHIN)
            with _understanding():
                page = [_listed(record) for record in reply["workers"]]
                more = bool(reply["more"] and page)
            found += page
        return found

    async def look_up(self, worker_id: str) -> tuple[Listed, int | None]:
        """Return one worker, and its pidfd if it is alive, which is the caller's to close. Raises SpawnerRefused."""
        reply, pidfd = await self._call(protocol.List(0, id=worker_id), _REPLY_WITHIN)
        try:
            with _understanding():
                return _listed(reply["workers"][0]), pidfd
        except SpawnerUnreachable:
            _close(pidfd)
            raise

    async def hello(self) -> Identity:
        """Return what the spawner says about itself now, on a connection made for that: a connection says it once."""
        try:
            async with asyncio.timeout(_REPLY_WITHIN), self._greeting:
                connection, identity = await self._open()
        except TimeoutError as error:
            raise SpawnerUnreachable(f"no answer within {_REPLY_WITHIN:.0f} s") from error
        connection.fail("done")
        return identity

    def close(self) -> None:
        """Close the connection; workers go on."""
        if self._connection is not None:
            self._connection.fail("this daemon is stopping")
            self._connection = None

    async def _call(
        self,
        request: protocol.Request,
        within: float,
        descriptor: int | None = None,
    ) -> tuple[dict[str, Any], int | None]:
        try:
            async with asyncio.timeout(within):
                return await self._exchange(await self._connected(), request, descriptor)
        except TimeoutError as error:
            raise SpawnerUnreachable(f"no answer within {within:.0f} s") from error

    async def _exchange(
        self, connection: _Connection, request: protocol.Request, descriptor: int | None
    ) -> tuple[dict[str, Any], int | None]:
        self._next += 1
        seq = self._next
        waiter = asyncio.get_running_loop().create_future()
        connection.waiting[seq] = waiter
        packet = encode(_numbered(request, seq))
        try:
            if descriptor is None:
                connection.sock.send(packet)
            else:
                socket.send_fds(connection.sock, [packet], [descriptor])
        except BlockingIOError as error:  # it has more to do than fits its queue; what others wait for still comes
            connection.waiting.pop(seq)
            raise SpawnerUnreachable("it is too busy to take a request") from error
        except OSError as error:
            connection.fail(str(error))
        try:
            message, received = await waiter
        except BaseException:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:  # it came, but too late
                _close(waiter.result()[1])
            raise
        finally:
            connection.waiting.pop(seq, None)
        try:
            with _understanding():
                if "error" in message:
                    raise SpawnerRefused(str(message["error"]["code"]), str(message["error"]["message"]))
                answer = message["ok"]
                if type(answer) is not dict:
                    raise TypeError("an answer that is no map")
        except BlockyardError:
            _close(received)
            raise
        return answer, received

    async def _connected(self) -> _Connection:
        async with self._connecting:
            if self._connection is not None and not self._connection.closed:
                return self._connection
            try:
                return await self._connect()
            except SpawnerUnreachable:
                if not await self._revive():
                    raise
            for _ in range(_LISTENS_WITHIN):  # systemd has accepted to start it, which is not to have started it
                with contextlib.suppress(SpawnerUnreachable):
                    return await self._connect()
                await asyncio.sleep(0.1)
            return await self._connect()

    async def _connect(self) -> _Connection:
        self._connection, _ = await self._open()
        return self._connection

    async def _open(self) -> tuple[_Connection, Identity]:
        loop = asyncio.get_running_loop()
        kind = socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        try:
            with contextlib.ExitStack() as opened:
                sock = opened.enter_context(socket.socket(socket.AF_UNIX, kind))
                sock.connect(self._path)  # a Unix socket connects at once or not at all
                opened.pop_all()
        except OSError as error:  # also where no descriptor is left
            raise SpawnerUnreachable(f"{self._path}: {error.strerror}") from error
        connection = _Connection(sock)

        def readable() -> None:
            try:
                connection.read()
            except BlockingIOError:
                return
            except (OSError, ValueError, RecursionError, OverflowError) as error:
                connection.fail(str(error))

        loop.add_reader(sock, readable)
        async with _closing_on_failure(connection), asyncio.timeout(_REPLY_WITHIN):
            reply, _ = await self._exchange(connection, protocol.Hello(0, protocol.VERSION), None)
            with _understanding():
                return connection, _identity(reply)


@contextlib.asynccontextmanager
async def _closing_on_failure(connection: _Connection) -> AsyncIterator[None]:
    try:
        yield
    except TimeoutError as error:
        connection.fail("no answer to hello")
        raise SpawnerUnreachable("no answer to the version exchange") from error
    except BaseException:
        connection.fail("the version exchange failed")
        raise


@contextlib.contextmanager
def _understanding() -> Iterator[None]:
    """Take a reply that is not of the expected shape for none at all: the spawner is of another version, or ill."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise SpawnerUnreachable("its reply is not one that this version understands") from error


def _close(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)


def encode(request: protocol.Request) -> bytes:
    """Turn a request into a packet."""
    return protocol.reply(op=type(request).__name__.lower(), **asdict(request))


def _numbered(request: protocol.Request, seq: int) -> protocol.Request:
    return type(request)(**{**{name: getattr(request, name) for name in request.__slots__}, "seq": seq})


def _identity(reply: dict[str, Any]) -> Identity:
    return Identity(
        int(reply["version"]),
        bool(reply["unprivileged"]),
        tuple(reply["controllers"]),
        int(reply["uids_free"]),
        int(reply["uids_total"]),
    )


def _result(record: dict[str, Any]) -> Result:
    return Result(str(record["reason"]), record["status"], record["signal"], int(record["oom_kills"]))


def _listed(record: dict[str, Any]) -> Listed:
    result = record["result"]
    return Listed(
        str(record["id"]),
        str(record["app"]),
        int(record["uid"]),
        str(record["cgroup"]),
        str(record["state"]),
        None if result is None else _result(result),
    )
