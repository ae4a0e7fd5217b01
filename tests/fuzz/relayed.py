"""The relay between hostile visitors and hostile workers, each against a live one, and what must hold throughout."""

import asyncio
import contextlib
import random
import re
import secrets
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import mutation
import oracles
from watched import Watch

AT_ONCE = 8
WITHIN = 20.0
_CHUNK = re.compile(rb"([0-9a-f]+)\r\n")


class Worker:
    """The app's side: reads what comes as the strictest of servers would, and answers well, or as it is told to."""

    def __init__(self) -> None:
        self.nonce = secrets.token_hex(8)
        self.numbers: set[int] = set()  # that the front gave to what arrived here
        self.violations: list[str] = []
        self.hostile: dict[bytes, bytes] = {}  # target: what is answered, as it is
        self.tasks: set[asyncio.Task[None]] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if task := asyncio.current_task():
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)
        try:
            while True:
                await self._one(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the relay gave the request up
        except (AssertionError, ValueError, asyncio.LimitOverrunError) as error:
            self.violations.append(f"{type(error).__name__}: {error}")
        finally:
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        first, fields = oracles.fields_of(head)
        self._is_counted(head, fields)
        target = first.split(b" ")[1]
        if target in self.hostile:
            writer.write(self.hostile[target])
            await writer.drain()
            return
        framing = oracles.framing_of(fields)
        if any(name == "expect" for name, _ in fields):
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if framing == "chunked":
            while size := int(_CHUNK.fullmatch(await reader.readuntil(b"\r\n"))[1], 16):
                await reader.readexactly(size)
                assert await reader.readexactly(2) == b"\r\n"
            assert await reader.readexactly(2) == b"\r\n"
        elif framing:
            await reader.readexactly(framing)
        body = answer_to(target)
        told = b"" if first.startswith(b"HEAD ") else body
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), told))
        await writer.drain()

    def _is_counted(self, head: bytes, fields: list[tuple[str, str]]) -> None:
        numbers = [value for name, value in fields if name == "x-front" and value.startswith(self.nonce)]
        assert len(numbers) == 1, f"a request that the front did not count: {head!r}"
        self.numbers.add(int(numbers[0].rpartition("-")[2]))


def answer_to(target: bytes) -> bytes:
    """Return what the worker answers to a target: its own name, so that no answer is taken for another."""
    return b"answer to " + target + b"." * (len(target) % 50)


class Relayed:
    """A relay in a process of its own, and a worker in this one."""

    def __init__(self, worker: Worker, process: asyncio.subprocess.Process, port: int) -> None:
        self.worker = worker
        self.process = process
        self.port = port

    async def counts(self) -> tuple[int, int, int]:
        """How many requests the front let pass, how many of them ended, and how many visitors are connected."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(b"count\n")
        async with asyncio.timeout(WITHIN):
            passed, ended, connected = map(int, (await self.process.stdout.readline()).split())
        return passed, ended, connected

    async def send(self, pieces: list[bytes] | tuple[bytes, ...], *, leave: bool, patience: float) -> bytes:
        """Send pieces as a visitor and return what is answered until nothing comes for a while."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        answer = b""
        try:
            for number, piece in enumerate(pieces):
                if number:
                    await asyncio.sleep(0.001)
                writer.write(piece)
            if leave:
                writer.write_eof()
            with contextlib.suppress(TimeoutError):
                while data := await asyncio.wait_for(reader.read(65536), patience):
                    answer += data
        except (ConnectionError, OSError):
            pass
        finally:
            writer.transport.abort()
        return answer

    async def next_visitor_is_served(self, chance: random.Random) -> None:
        """Ask as somebody else and expect the one right answer, to the byte."""
        target = b"/next/%d" % chance.randrange(10**9)
        answer = b""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(b"GET " + target + b" HTTP/1.1\r\nHost: demo\r\nConnection: close\r\n\r\n")
            async with asyncio.timeout(WITHIN):
                answer = await reader.read()
        finally:
            writer.transport.abort()
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 OK\r\n"), answer
        assert body == answer_to(target), answer


@contextlib.asynccontextmanager
async def relayed() -> AsyncIterator[Relayed]:
    """Start both; end both."""
    with tempfile.TemporaryDirectory(prefix="by-fuzz-") as directory:
        worker, path = Worker(), f"{directory}/worker.sock"
        server = await asyncio.start_unix_server(worker.serve, path, limit=1 << 20)
        program = str(Path(__file__).with_name("relay_process.py"))
        process = await asyncio.create_subprocess_exec(
            sys.executable, program, path, worker.nonce,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        try:
            assert process.stdout
            async with asyncio.timeout(WITHIN):
                port = int(await process.stdout.readline())
            yield Relayed(worker, process, port)
        finally:
            if process.returncode is None:
                process.kill()
            _, errors = await process.communicate()
            server.close()
            for task in list(worker.tasks):
                task.cancel()
            await asyncio.gather(*worker.tasks, return_exceptions=True)
        assert not errors, errors.decode(errors="replace")


async def _fuzz(seconds: float, seed: int, case: Callable[[Relayed, random.Random, int], Awaitable[None]]) -> str:
    async with relayed() as stage:
        watch = Watch(stage.process.pid)
        chance = random.Random(seed)
        end, count = time.monotonic() + seconds, 0
        await stage.next_visitor_is_served(chance)
        while time.monotonic() < end:
            several = [random.Random(chance.randrange(2**64)) for _ in range(AT_ONCE)]
            await asyncio.gather(*[case(stage, each, count + number) for number, each in enumerate(several)])
            count += AT_ONCE
            await stage.next_visitor_is_served(chance)
            assert not stage.worker.violations, stage.worker.violations
            if count == 30 * AT_ONCE:
                watch.remember()
        passed, _, _ = await stage.counts()
        assert len(stage.worker.numbers) <= passed
        assert max(stage.worker.numbers) <= passed
        async with asyncio.timeout(WITHIN):  # everybody has left, so nothing may be under way for long
            while (counts := await stage.counts()) != (passed, passed, 0):
                passed = counts[0]
                await asyncio.sleep(0.1)
        await asyncio.to_thread(watch.holds, 24 << 10)
        return f"{count} cases, {passed} requests let pass"


async def _visitor(stage: Relayed, chance: random.Random, _: int) -> None:
    pieces = mutation.split(chance, mutation.request(chance))
    answer = await stage.send(tuple(pieces), leave=chance.random() < 0.7, patience=0.15)
    assert not answer or re.match(rb"HTTP/1\.1 [1-5][0-9]{2} ", answer), answer


async def _hostile_worker(stage: Relayed, chance: random.Random, number: int) -> None:
    target = b"/hostile/%d" % number
    stage.worker.hostile[target] = mutation.response(chance)
    method = chance.choice([b"GET", b"GET", b"HEAD", b"POST"])
    ending = chance.choice([b"", *[b"Connection: close\r\n"] * 5])
    fields = b" HTTP/1.1\r\nHost: demo\r\nContent-Length: 0\r\n" + ending + b"\r\n"
    answer = await stage.send((method + b" " + target + fields,), leave=False, patience=0.15)
    del stage.worker.hostile[target]
    while answer:  # the interim heads, and the last one
        head, end, answer = answer.partition(b"\r\n\r\n")
        if not end:
            break
        first, found = oracles.fields_of(head + end)
        assert re.match(rb"HTTP/1\.1 [1-9][0-9]{2}", first), first
        for name, value in found:
            assert not re.fullmatch("clear-site-data|strict-transport-security|service-worker-allowed", name), head
            ours = value.startswith("blockyard_route=ours;")
            assert name != "set-cookie" or ours or "blockyard_" not in value.lower(), head
        oracles.framing_of(found)
        if not first.startswith(b"HTTP/1.1 1"):
            break
    await stage.next_visitor_is_served(chance)


def visitors(seconds: float, seed: int) -> str:
    """Hostile requests: the worker sees none that the front did not count, and the next visitor is served."""
    return asyncio.run(_fuzz(seconds, seed, _visitor))


def workers(seconds: float, seed: int) -> str:
    """Hostile answers: a visitor sees one answer with one meaning, and the next visitor's is his own, to the byte."""
    return asyncio.run(_fuzz(seconds, seed, _hostile_worker))
