"""The loop: connections in, one table of what a peer may ask, replies out."""

import asyncio
import fcntl
import os
import socket
import stat
import struct
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

from blockyard_spawner import protocol
from blockyard_spawner.audit import audit
from blockyard_spawner.cgroup import readable
from blockyard_spawner.protocol import MAX_PACKET, Hello, List, Refused, Request, Spawn, Stop
from blockyard_spawner.workers import Worker

_CONNECTIONS = 8  # further ones wait to be accepted
_WAITING = 1024  # requests of one connection that are not answered yet
_PAUSE = 0.05  # seconds after a refusal, so that a flood of them does not fill the audit
_ONE_DESCRIPTOR = socket.CMSG_LEN(4)  # CMSG_SPACE would leave room for two

Answer = tuple[dict[str, object], int]  # the reply's map, and a descriptor to go with it or -1


class Backend(Protocol):
    """What starts and ends workers: `workers.Workers` here, something else in another helper of the same protocol."""

    @property
    def by_id(self) -> dict[str, Worker]:
        """All workers, also those that ended lately."""

    def about(self) -> dict[str, object]:
        """Describe the host on the wire."""

    async def spawn(self, request: Spawn, log: int, peer: Mapping[str, object]) -> Worker:
        """Start one. Raises Refused."""

    async def stop(self, worker: Worker, grace: float, peer: Mapping[str, object]) -> None:
        """End one; return when nothing of it is left."""


async def serve(listener: socket.socket, peers: set[int], workers: Backend) -> None:
    """Answer the uids in `peers`, until cancelled."""
    room = asyncio.Semaphore(_CONNECTIONS)
    async with asyncio.TaskGroup() as conversations:
        while await room.acquire():
            connection, _ = await asyncio.get_running_loop().sock_accept(listener)
            task = conversations.create_task(_Conversation(connection, workers).hold(peers))
            task.add_done_callback(lambda _: room.release())


class _Conversation:
    """One peer. Whatever it sends costs nothing but this connection."""

    def __init__(self, connection: socket.socket, workers: Backend) -> None:
        self._connection, self._workers, self._greeted = connection, workers, False
        self._waiting, self._refused = 0, False
        pid, uid, _ = struct.unpack("iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        self._peer = {"peer_pid": pid, "peer_uid": uid}
        connection.setblocking(False)

    async def hold(self, peers: set[int]) -> None:
        """Answer until the peer goes. Requests begin in order; what takes time may be overtaken by others."""
        with self._connection:
            try:
                async with asyncio.TaskGroup() as answering:
                    while self._peer["peer_uid"] in peers:
                        await self._take(answering)
                    audit("refusal", "Connect as the API's user.", result="wrong_peer", **self._peer)
                    self._refused = True
            except* (OSError, EOFError):  # it has gone, or is not understood; what it asked for goes on
                pass  # and no await is here: the spawner's end would come out of it as a group, an error
            await asyncio.sleep(_PAUSE * self._refused)  # in its place: nothing is gained by connecting anew

    async def _take(self, answering: asyncio.TaskGroup) -> None:
        await readable(self._connection.fileno())
        packet, control, flags, _ = self._connection.recvmsg(MAX_PACKET, _ONE_DESCRIPTOR, socket.MSG_CMSG_CLOEXEC)
        descriptors = [number for _, _, data in control for number in struct.unpack(f"{len(data) // 4}i", data)]
        self._waiting += 1
        answering.create_task(self._answer(packet, flags, descriptors))
        await asyncio.sleep(0)  # until it is answered, or waits for something
        await asyncio.sleep(_PAUSE * self._refused)
        self._refused = False

    async def _answer(self, packet: bytes, flags: int, descriptors: list[int]) -> None:
        request = None
        try:
            request = self._understand(packet, flags, descriptors)
            if self._waiting > _WAITING:
                raise Refused("too_many_requests", "Wait for the replies to earlier ones.")  # noqa: TRY301 - answered below
            answer, attached = await HANDLERS[type(request)](self, request, descriptors)
        except (Refused, OSError, RuntimeError) as error:  # the last: the spawner is ending
            code, message = error.args if isinstance(error, Refused) else ("system_error", f"See to the host: {error}.")
            subject = {"worker": getattr(request, "id", None), "app": getattr(request, "app", None)}
            audit("refusal", message, result=code, **subject, **self._peer)
            self._send(request.seq if request else None, error={"code": code, "message": message})
            self._refused = True
            if not request:
                raise EOFError from error  # it does not keep to the protocol, so nobody listens to it any more
        else:
            self._send(request.seq, attached, ok=answer)
        finally:
            self._waiting -= 1
            for descriptor in descriptors:
                os.close(descriptor)

    def _understand(self, packet: bytes, flags: int, descriptors: list[int]) -> Request:
        if not packet:
            raise EOFError
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise Refused("too_large", "Send packets of at most 64 KiB, with one descriptor at most.")
        request = protocol.decode(packet)
        if self._greeted == isinstance(request, Hello):
            raise Refused("hello_first", "Say hello first, and once.")
        if descriptors and not isinstance(request, Spawn):
            raise Refused("unexpected_descriptor", "Send a descriptor with 'spawn' alone.")
        return request

    def _find(self, name: str) -> Worker:
        worker = self._workers.by_id.get(name)
        if worker is None or worker.state == "starting":
            raise Refused("unknown_worker", f"Check the id: there is no worker {name}.")
        return worker

    def _send(self, seq: int | None, attached: int = -1, **answer: object) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", attached))] if attached >= 0 else []
        # BlockingIOError, if the peer does not read.
        self._connection.sendmsg([protocol.reply(seq=seq, **answer)], rights)

    async def _hello(self, request: Hello, _: list[int]) -> Answer:
        if request.version != protocol.VERSION:
            raise Refused("unsupported_version", f"Speak version {protocol.VERSION}.")
        self._greeted = True
        return {"version": protocol.VERSION, **self._workers.about()}, -1

    async def _spawn(self, request: Spawn, descriptors: list[int]) -> Answer:
        worker = await self._workers.spawn(request, _log_pipe(descriptors), self._peer)
        return worker.record(), worker.pidfd

    async def _stop(self, request: Stop, _: list[int]) -> Answer:
        worker = self._find(request.id)
        await self._workers.stop(worker, request.grace / 1000, self._peer)
        return {"id": worker.id, "result": worker.result}, -1

    async def _list(self, request: List, _: list[int]) -> Answer:
        known = sorted(name for name, worker in self._workers.by_id.items() if worker.state != "starting")
        names = [request.id] if request.id else [name for name in known if name > (request.after or "")]
        page = [self._find(name).record("app", "state", "result") for name in names[: protocol.PAGE]]
        answer = {**self._workers.about(), "workers": page, "more": len(names) > protocol.PAGE}
        return answer, self._find(request.id).pidfd if request.id else -1


# The whole privileged surface.
HANDLERS: Mapping[type, Callable[[_Conversation, Any, list[int]], Awaitable[Answer]]] = {
    Hello: _Conversation._hello,
    Spawn: _Conversation._spawn,
    Stop: _Conversation._stop,
    List: _Conversation._list,
}


def _log_pipe(descriptors: list[int]) -> int:
    for descriptor in descriptors:
        access = fcntl.fcntl(descriptor, fcntl.F_GETFL) & (os.O_ACCMODE | os.O_PATH)
        if stat.S_ISFIFO(os.fstat(descriptor).st_mode) and access == os.O_WRONLY:
            return descriptor
    raise Refused("no_log_pipe", "Send the write end of a pipe with 'spawn': the worker's log.")
