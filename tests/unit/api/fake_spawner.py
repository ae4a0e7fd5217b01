"""A spawner that speaks the real protocol over a real SEQPACKET socket, runs nothing, and can misbehave.

Its workers are HTTP servers in this very process, below the same runtime directory and under the same uid, so that a
fleet can be watched in milliseconds and without root. In a pidfd's place goes an eventfd: readable once the worker is
gone, which is all that a client may do with either.
"""

import array
import asyncio
import contextlib
import os
import socket
from dataclasses import dataclass, field
from pathlib import Path

from blockyard_spawner import protocol

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok"


@dataclass(eq=False)
class Worker:
    """One worker; it stops by itself when it is told to."""

    request: protocol.Spawn
    log: int
    gone: int
    result: dict[str, object] | None = None
    server: asyncio.Server | None = None
    told: list[str] = field(default_factory=list)

    @property
    def id(self):
        return self.request.id

    @property
    def running(self):
        return self.result is None


class FakeSpawner:
    """Listens at `path`; tests script it through its attributes, each of which is a way to misbehave."""

    def __init__(self, path, runtime_dir):
        self.path = Path(path)
        self.runtime_dir = Path(runtime_dir)
        self.workers = {}
        self.most_running = 0
        self.requests = []
        self.refuse = None  # (code, message) for every spawn
        self.serves = True  # whether workers come to answer
        self.answer = ANSWER
        self.uid = os.getuid()  # told in replies
        self.silent = set()  # operations that get no answer
        self.hang_up = set()  # operations upon which the connection is closed instead
        self.rewrite = {}  # operation -> a function from the reply's map to what is sent instead
        self.tokens = {}  # a worker's id -> of the pages that it made, as Shiny keeps them
        self.busy = set()  # workers that compute, and answer nobody
        self.words = b""  # what a worker writes to its log when it starts
        self.held = []  # replies kept back, as functions that send them
        self.hold = set()  # operations whose replies are kept back
        self._listener = None
        self._connections = set()
        self._loop = None

    # --- its own life

    def start(self):
        self._loop = asyncio.get_running_loop()
        self.runtime_dir.mkdir(exist_ok=True)
        self.path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        self._listener.bind(str(self.path))
        self._listener.listen(16)
        self._loop.add_reader(self._listener, self._accept)

    def stop(self):
        """Go away, as a killed spawner does: its workers stay."""
        self._loop.remove_reader(self._listener)
        self._listener.close()
        self.path.unlink()
        for connection in list(self._connections):
            self._drop(connection)

    async def close(self):
        self.stop()
        for worker in self.workers.values():
            self.exit(worker.id)
            os.close(worker.gone)

    def _accept(self):
        connection, _ = self._listener.accept()
        connection.setblocking(False)
        self._connections.add(connection)
        self._loop.add_reader(connection, self._read, connection)

    def _drop(self, connection):
        if connection in self._connections:
            self._connections.discard(connection)
            self._loop.remove_reader(connection)
            connection.close()

    # --- its workers

    def running(self, app=None):
        return [worker for worker in self.workers.values() if worker.running and app in (None, worker.request.app)]

    def exit(self, worker_id, status=0, number=None, oom_kills=0):
        """End a worker, as a crash or its own exit does."""
        worker = self.workers[worker_id]
        if not worker.running:
            return
        reason = "oom" if oom_kills else "signalled" if number else "exited"
        worker.result = {"reason": reason, "status": status, "signal": number, "oom_kills": oom_kills}
        if worker.server is not None:
            worker.server.close()
        os.close(worker.log)
        with contextlib.suppress(FileNotFoundError):
            self.socket_of(worker_id).unlink()
            self.socket_of(worker_id).parent.rmdir()
        os.eventfd_write(worker.gone, 1)

    def socket_of(self, worker_id):
        return self.runtime_dir / worker_id / "app.sock"

    async def serve(self, worker_id):
        """Let a worker come to answer."""
        worker = self.workers[worker_id]

        async def respond(reader, writer):
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                asked = await reader.readuntil(b"\r\n\r\n")
                if worker_id in self.busy:
                    await reader.read()
                writer.write(self._page(worker_id, asked))
                await writer.drain()
            writer.close()

        if worker.running and worker.server is None:
            worker.server = await asyncio.start_unix_server(respond, self.socket_of(worker_id))

    def _page(self, worker_id, asked):
        if not asked.startswith(b"GET /session/"):
            return self.answer
        known = asked.split(b"/")[2] in self.tokens.get(worker_id, ())
        return b"HTTP/1.1 %b\r\nContent-Length: 0\r\n\r\n" % (b"400 Bad Request" if known else b"404 Not Found")

    # --- its protocol

    def _read(self, connection):
        try:
            packet, ancillary, _, _ = connection.recvmsg(protocol.MAX_PACKET, socket.CMSG_LEN(4))
        except BlockingIOError:
            return
        except OSError:
            packet = b""
        if not packet:
            self._drop(connection)
            return
        descriptors = array.array("i")
        for _, _, data in ancillary:
            descriptors.frombytes(data)
        request = protocol.decode(packet)
        operation = type(request).__name__.lower()
        self.requests.append(request)
        if operation in self.hang_up:
            for descriptor in descriptors:
                os.close(descriptor)
            self._drop(connection)
            return
        try:
            ok, attached = getattr(self, f"_{operation}")(request, list(descriptors))
            message = {"seq": request.seq, "ok": ok}
        except protocol.Refused as refused:
            for descriptor in descriptors:
                os.close(descriptor)
            message, attached = {"seq": request.seq, "error": {"code": refused.code, "message": refused.message}}, None
        if operation in self.silent:
            return
        message = self.rewrite.get(operation, lambda given: given)(message)
        if operation in self.hold:
            self.held.append(lambda: self._send(connection, message, attached))
        else:
            self._send(connection, message, attached)

    def _send(self, connection, message, attached):
        if connection in self._connections:
            packet = message if isinstance(message, bytes) else protocol.reply(**message)
            with contextlib.suppress(OSError):  # it left without waiting
                socket.send_fds(connection, [packet], [] if attached is None else [attached])

    def release(self):
        """Send what was kept back."""
        held, self.held = self.held, []
        for send in held:
            send()

    def _hello(self, request, _):
        uids = {"uids_free": 1000 - len(self.running()), "uids_total": 1000}
        return {"version": protocol.VERSION, "unprivileged": False, "controllers": [], "network": "host", **uids}, None

    def _spawn(self, request, descriptors):
        if self.refuse:
            raise protocol.Refused(*self.refuse)
        if request.id in self.workers:
            raise protocol.Refused("worker_exists", "Use a new id.")
        worker = self.workers[request.id] = Worker(request, descriptors[0], os.eventfd(0, os.EFD_CLOEXEC))
        self.most_running = max(self.most_running, len(self.running()))
        self.socket_of(request.id).parent.mkdir(parents=True)
        if self.words:
            os.write(worker.log, self.words)
        if self.serves:
            worker.told.append("serve")
            self._serving = self._loop.create_task(self.serve(request.id))
        return self._record(worker), worker.gone

    def _stop(self, request, _):
        if request.id not in self.workers:
            raise protocol.Refused("unknown_worker", "Check the id.")
        worker = self.workers[request.id]
        worker.told.append("stop")
        if worker.running:
            self.exit(worker.id)
            worker.result = {**worker.result, "reason": "stopped"}
        return {"id": request.id, "result": worker.result}, None

    def _list(self, request, _):
        if request.id is not None:
            if request.id not in self.workers:
                raise protocol.Refused("unknown_worker", "Check the id.")
            worker = self.workers[request.id]
            attached = worker.gone if worker.running else None
            return {"workers": [self._listed(worker)], "more": False, "unprivileged": False}, attached
        after = sorted(worker for worker in self.workers if worker > (request.after or ""))
        page = [self._listed(self.workers[name]) for name in after[: protocol.PAGE]]
        return {"workers": page, "more": len(after) > protocol.PAGE, "unprivileged": False}, None

    def _record(self, worker):
        return {"id": worker.id, "uid": self.uid, "pid": 1, "cgroup": "", "started_at": 0.0}

    def _listed(self, worker):
        state = "running" if worker.running else "ended"
        return {**self._record(worker), "app": worker.request.app, "state": state, "result": worker.result}
