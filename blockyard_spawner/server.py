"""The loop: connections in, one table of what a peer may ask, replies out."""

import asyncio
import fcntl
import os
import socket
import stat
import struct
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from blockyard_spawner import policy
from blockyard_spawner.cgroup import readable
from blockyard_spawner.protocol import MAX_PACKET, PAGE, VERSION, Hello, List, Refused, Spawn, Stop, decode, reply
from blockyard_spawner.workers import Workers

_CONNECTIONS = 8  # further ones wait to be accepted
_UNANSWERED = 1024  # requests of one connection that wait for an end; it is not read beyond that
_ONE_DESCRIPTOR = socket.CMSG_LEN(4)  # CMSG_SPACE would leave room for two
_DAMAGED = socket.MSG_TRUNC | socket.MSG_CTRUNC

Answer = tuple[dict[str, object], int]  # the reply's map, and a descriptor to go with it, or -1


async def serve(listener: socket.socket, peers: set[int], workers: Workers) -> None:
    """Answer the uids in `peers`, until cancelled."""
    room = asyncio.Semaphore(_CONNECTIONS)
    async with asyncio.TaskGroup() as conversations:
        while await room.acquire():
            connection, _ = await asyncio.get_running_loop().sock_accept(listener)
            connection.setblocking(False)
            pid, uid, _ = struct.unpack("iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            conversation = _Conversation(connection, {"peer_pid": pid, "peer_uid": uid}, workers)
            task = conversations.create_task(conversation.run(welcome=uid in peers))
            task.add_done_callback(lambda _: room.release())


class _Conversation:
    """One peer. Whatever it sends costs nothing but this connection."""

    def __init__(self, connection: socket.socket, peer: dict[str, object], workers: Workers) -> None:
        self._connection, self._peer, self._workers = connection, peer, workers
        self._greeted = False

    async def run(self, *, welcome: bool) -> None:
        """Answer until the peer goes. Requests begin in order; only a `stop` takes time, so others may overtake it."""
        room = asyncio.Semaphore(_UNANSWERED)
        try:
            async with asyncio.TaskGroup() as answers:
                while await room.acquire():
                    packet, descriptors = await self._receive(welcome=welcome)
                    answers.create_task(self._answer(packet, descriptors)).add_done_callback(lambda _: room.release())
        except* OSError:
            self._connection.close()  # it has gone, or sends without reading: its stops go on, nobody waits for them

    async def _receive(self, *, welcome: bool) -> tuple[bytes, list[int]]:
        if not welcome:
            raise self._refused("wrong_peer", "Connect as the API's user.")
        await readable(self._connection.fileno())
        packet, control, flags, _ = self._connection.recvmsg(MAX_PACKET, _ONE_DESCRIPTOR, socket.MSG_CMSG_CLOEXEC)
        descriptors = [number for _, _, data in control for number in struct.unpack(f"{len(data) // 4}i", data)]
        if packet and not flags & _DAMAGED:
            return packet, descriptors
        for descriptor in descriptors:
            os.close(descriptor)
        if packet:
            raise self._refused("too_large", "Send packets of at most 64 KiB, with one descriptor at most.")
        raise ConnectionResetError

    def _refused(self, code: str, message: str, **subject: object) -> ConnectionResetError:
        self._workers.audit.write("refusal", message, result=code, **subject, **self._peer)
        return ConnectionResetError(code)

    async def _answer(self, packet: bytes, descriptors: list[int]) -> None:
        seq, subject, rights = None, {}, []
        try:
            request = decode(packet)
            seq, subject = request.seq, {"worker": getattr(request, "id", None), "app": getattr(request, "app", None)}
            ok, attached = await self._handle(request, descriptors)
            answer = reply(seq=seq, ok=ok)
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", attached))] if attached >= 0 else []
        except (Refused, OSError) as error:
            refused = error if isinstance(error, Refused) else Refused("system_error", f"See to the host: {error}.")
            self._refused(refused.code, refused.message, **subject)
            answer = reply(seq=seq or refused.seq, error={"code": refused.code, "message": refused.message})
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        self._connection.sendmsg([answer], rights)  # BlockingIOError, if it does not read: an OSError as any other

    async def _handle(self, request: Any, descriptors: list[int]) -> Answer:  # noqa: ANN401 - any row of HANDLERS
        if self._greeted == isinstance(request, Hello):
            raise Refused("hello_first", "Say hello first, and once.")
        if descriptors and not isinstance(request, Spawn):
            raise Refused("unexpected_descriptor", "Send a descriptor with 'spawn' alone.")
        return await HANDLERS[type(request)](self, request, descriptors)

    async def _hello(self, request: Hello, _: list[int]) -> Answer:
        if request.version != VERSION:
            raise Refused("unsupported_version", f"Speak version {VERSION}.")
        self._greeted = True
        return {"version": VERSION, **self._workers.about()}, -1

    async def _spawn(self, request: Spawn, descriptors: list[int]) -> Answer:
        wanted = policy.authorize(self._workers.config, request)
        worker = self._workers.spawn(wanted, _log_pipe(descriptors), self._peer)
        return {**worker.record(), "started_at": time.time()}, worker.pidfd

    async def _stop(self, request: Stop, _: list[int]) -> Answer:
        worker = await self._workers.stop(request.id, request.grace / 1000, self._peer)
        return {"id": worker.id, "result": worker.result}, -1

    async def _list(self, request: List, _: list[int]) -> Answer:
        known = [worker for _, worker in sorted(self._workers.by_id.items()) if worker.state != "starting"]
        after = [worker for worker in known if worker.id > (request.after or "")]
        found = [self._workers.find(request.id)] if request.id else after
        page = [worker.record("app", "state", "result") for worker in found[:PAGE]]
        answer = {"workers": page, "more": len(found) > PAGE, "unprivileged": self._workers.unprivileged}
        return answer, found[0].pidfd if request.id else -1


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
