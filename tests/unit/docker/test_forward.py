"""A Docker worker's output on its way to the API: in what order and how often, and what the engine says in between."""

import asyncio
import contextlib
import os
import re
import struct

import pytest
from aiohttp import web

from blockyard_spawner.docker import engine as engine_module
from blockyard_spawner.docker import forward as forward_module
from blockyard_spawner.docker.engine import Output, Turns, connected
from blockyard_spawner.docker.forward import Position, forward
from blockyard_spawner.protocol import Refused

MOMENT = "1767323045.000000001"


def at(nanoseconds):
    return f"2026-01-02T03:04:05.{nanoseconds:09}Z"


def frame(stream, text):
    """Build what the engine sends for a piece."""
    return struct.pack(">BxxxL", stream, len(text)) + text.encode()


class Engine:
    """Keeps a container's output, in the order in which it came to it, and gives out what is asked for."""

    def __init__(self):
        self.log = []  # (stream, time or nothing, text)
        self.asked = []  # from when on
        self.cuts_first_look_after = None  # that many pieces
        self.answer = None  # what answers in its place
        self.drops_all_older = True  # Docker 20.10; newer ones drop only what comes before the first that is new enough

    async def version(self, _):
        return web.json_response({"ApiVersion": "1.41"})

    async def answered(self, request):
        return await self.answer(request)

    async def logs(self, request):
        if self.answer:
            return await self.answer(request)
        since = request.query["since"]
        self.asked.append(since)
        body, found = bytearray(), False
        shown = self.cuts_first_look_after if len(self.asked) == 1 else None
        for stream, moment, text in self.log[:shown]:
            late = not moment or f"1767323045.{moment[20:29]}" >= since
            found = found or late
            if late or (found and not self.drops_all_older):
                body += frame(stream, f"{moment} {text}" if moment else text)
        return web.Response(body=bytes(body), content_type="application/octet-stream")


@pytest.fixture
async def engine(tmp_path):
    keeping = Engine()
    application = web.Application()
    application.add_routes(
        [
            web.get("/version", keeping.version),
            web.get("/{version}/containers/some/logs", keeping.logs),
            web.route("*", "/{version}/{other:.*}", keeping.answered),
        ]
    )
    runner = web.AppRunner(application)
    await runner.setup()
    path = str(tmp_path / "docker.sock")
    await web.UnixSite(runner, path).start()
    keeping.path = path
    async with connected(path) as keeping.connection:
        yield keeping
    await runner.cleanup()


async def moved(engine, position, looks=2):
    """Move all there is, until the container has ended before the last of some looks; return what came."""
    reading, writing = os.pipe()
    left = iter([False] * (looks - 1) + [True])
    try:
        await asyncio.wait_for(forward(engine.connection, "some", writing, position, lambda: next(left)), 10)
    finally:
        os.close(writing)
    try:
        return os.read(reading, 1 << 20).decode().split()
    finally:
        os.close(reading)


async def given_out(engine):
    """Return all pieces of the engine's log with their times."""
    found = []
    async with engine.connection.output("some", "0") as output:
        while await output.more(None):
            found += output.pieces()
    return found


async def test_what_the_engine_says_of_its_own_is_no_output(engine):
    engine.log = [
        (1, at(1), "one\n"),
        (3, "", "Error grabbing logs: unexpected EOF\n"),
        (1, "", "rotated, it says without a time\n"),
        (2, at(1), "two\n"),
    ]
    assert [data for _, data in await given_out(engine)] == [b"one\n", b"two\n"]


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("2026-01-02T03:04:05.5Z", "1767323045.500000000"),
        ("2026-01-02T04:04:05+01:00", "1767323045.000000000"),
        ("2026-01-02T03:04:05.000000001Z", MOMENT),
        ("2026-01-02T03:04:05.999999999+00:00", "1767323045.999999999"),
    ],
)
async def test_times_are_read_in_every_form_that_engines_write(engine, written, meant):
    engine.log = [(1, written, "one\n")]
    assert [moment for moment, _ in await given_out(engine)] == [meant]


@pytest.mark.parametrize("drops_all_older", [True, False])
async def test_lines_whose_times_are_not_in_order_are_moved_once_and_all(engine, tmp_path, drops_all_older):
    engine.drops_all_older = drops_all_older
    engine.log = [(1, at(nanosecond), f"line{nanosecond}\n") for nanosecond in range(4, 104, 2)]
    engine.log.append((2, at(51), "to-standard-error\n"))  # stamped before, and queued after
    lines = [text.strip() for _, _, text in engine.log]
    assert await moved(engine, Position(str(tmp_path / "position"))) == lines
    assert len(engine.asked) == 2  # it has asked again whether there was more

    engine.log.append((1, at(49), "later\n"))
    engine.log.append((1, at(200), "latest\n"))
    again = Position(str(tmp_path / "position"))  # as after a restart
    assert await moved(engine, again) == ["later", "latest"]


async def test_parts_of_one_time_are_moved_once_and_all(engine, tmp_path):
    position = Position(str(tmp_path / "position"))
    engine.log = [(1, at(7), text) for text in ("a\n", "b\n", "c\n")]
    assert await moved(engine, position) == ["a", "b", "c"]
    engine.log += [(1, at(7), "d\n"), (1, at(7), "e\n")]
    assert await moved(engine, position) == ["d", "e"]


async def test_a_line_that_was_cut_off_in_the_middle_is_moved_once_and_whole(engine, tmp_path):
    engine.log = [(1, at(1), "a "), *((1, at(2), part) for part in ("x", "y", "z"))]
    engine.cuts_first_look_after = 3
    assert await moved(engine, Position(str(tmp_path / "position"))) == ["a", "xyz"]


async def test_where_the_engine_has_dropped_the_last_piece_what_is_newer_is_moved_all_the_same(engine, tmp_path):
    position = Position(str(tmp_path / "position"))
    engine.log = [(1, at(7), "a\n")]
    assert await moved(engine, position) == ["a"]
    engine.log = [(1, at(8), "b\n"), (1, at(7), "c\n")]
    assert await moved(engine, position) == ["b", "c"]


@pytest.mark.parametrize(
    "kept", ["", "Error 1", f"{MOMENT} many {MOMENT}", f"{MOMENT} 1", f"{MOMENT} 1 now", f"{MOMENT} 1 2 3", "\0"]
)
def test_a_position_that_makes_no_sense_is_the_beginning(tmp_path, kept):
    path = tmp_path / "position"
    path.write_text(kept)
    assert Position(str(path)).since == "0"


async def test_output_is_moved_also_where_no_position_can_be_written_down(engine, tmp_path):
    engine.log = [(1, at(nanosecond), f"line{nanosecond}\n") for nanosecond in range(5)]
    for name, target in (("full", "/dev/full"), ("absent", str(tmp_path / "no" / "directory"))):
        position = Position(str(tmp_path / name))
        (tmp_path / name).symlink_to(target)
        assert await moved(engine, position) == [f"line{number}" for number in range(5)]
        assert not position.unmoved()(at_position(4))


def at_position(nanoseconds):
    return f"1767323045.{nanoseconds:09}"


def test_a_position_has_its_place_before_an_app_can_fill_the_file_system(tmp_path):
    path = tmp_path / "position"
    with Position(str(path)):
        assert path.stat().st_blocks
        assert path.stat().st_size == len(Position(str(path)).written())
        assert Position(str(path)).since == "0"


# --- what floods -----------------------------------------------------------------------------------------------------


class Flood:
    """An engine, and a container in it that writes so many bytes as fast as anybody reads them."""

    def __init__(self, size):
        self.turns, self.left = Turns(), size
        self.line = frame(1, f"{at(1)} x\n")

    @contextlib.asynccontextmanager
    async def output(self, container, since):
        yield Output(self)

    async def read(self, size):
        count = min(size, self.left) // len(self.line)
        self.left -= count * len(self.line)
        return self.line * count


async def test_however_many_apps_flood_the_loop_turns_after_each_piece_of_work(tmp_path):
    floods = [Flood(1 << 18) for _ in range(10)]
    for flood in floods:
        flood.turns = floods[0].turns  # they are of one engine
    turns, pipe = 0, os.open("/dev/null", os.O_WRONLY)
    moving = [
        asyncio.create_task(forward(flood, "some", pipe, Position(str(tmp_path / f"{number}")), lambda: True))
        for number, flood in enumerate(floods)
    ]
    while not all(task.done() for task in moving):
        await asyncio.sleep(0)
        turns += 1
    os.close(pipe)
    assert [flood.left // len(flood.line) for flood in floods] == [0] * 10
    assert turns >= 10 * (1 << 18) // engine_module._AT_ONCE


async def test_an_engine_is_asked_and_answers_while_a_container_floods(engine, tmp_path):
    flood = Flood(1 << 62)  # without end
    flood.turns = engine.connection.turns
    pipe = os.open("/dev/null", os.O_WRONLY)
    position = Position(str(tmp_path / "position"))
    moving = asyncio.create_task(forward(flood, "some", pipe, position, lambda: False))
    before = flood.left
    engine.log = [(1, at(1), "quiet\n")]
    assert await moved(engine, Position(str(tmp_path / "another"))) == ["quiet"]
    assert not moving.done()
    assert flood.left < before
    moving.cancel()
    await asyncio.wait([moving])
    os.close(pipe)


TOLD = re.compile(r"^\[blockyard [0-9TZ:-]+\] at least (\d+) bytes were dropped: .* a second$", re.MULTILINE)


@pytest.fixture
def drops(monkeypatch):
    """Nothing more passes after so many bytes; each line of the engine's has its text and 40."""

    def after(size):
        monkeypatch.setattr(forward_module, "BURST", size)
        monkeypatch.setattr(forward_module._Flow, "refill", lambda self: None)

    return after


async def text_of(engine, position, looks=2):
    return " ".join(await moved(engine, position, looks)).replace(" [blockyard", "\n[blockyard")


async def test_what_comes_too_fast_is_dropped_and_a_line_tells_how_much(engine, tmp_path, drops):
    drops(3 * 46)
    engine.log = [(1, at(number), f"line{number}\n") for number in range(1, 9)]
    found = await text_of(engine, Position(str(tmp_path / "position")))
    assert found.startswith("line1 line2 line3\n")
    assert [int(number) for number in TOLD.findall(found)] == [5 * len("line1\n")]


def test_what_was_dropped_is_told_before_what_comes_after_it_and_in_a_line_of_its_own(drops):
    drops(50)
    flow = forward_module._Flow()
    assert flow.passed(b"begun") == b"begun"
    assert flow.passed(b"more\n") == b""
    flow._left = forward_module.RATE - 1  # not before there is room for a second's
    assert flow.passed(b"") == b""
    flow._left += 1
    assert re.fullmatch(rb"\n\[blockyard [^]]+\] at least 5 bytes were dropped: .*\nafter\n", flow.passed(b"after\n"))
    assert flow.told() == b""


async def test_a_flood_that_is_over_is_told_although_the_app_says_nothing_more(tmp_path, drops, monkeypatch):
    drops(50)
    monkeypatch.setattr(forward_module, "_QUIET", 0.01)

    class Silent(Flood):
        async def read(self, size):
            return await super().read(size) or await asyncio.Event().wait()

    reading, writing = os.pipe()
    position = Position(str(tmp_path / "position"))
    moving = asyncio.create_task(forward(Silent(4096), "some", writing, position, lambda: False))
    os.set_blocking(reading, False)
    found = ""
    while not TOLD.search(found):
        await asyncio.sleep(0.01)
        with contextlib.suppress(BlockingIOError):
            found += os.read(reading, 65536).decode()
    assert found.startswith("x\n[blockyard")
    moving.cancel()
    await asyncio.wait([moving])
    os.close(reading)
    os.close(writing)


async def test_after_a_restart_neither_what_was_moved_nor_what_was_dropped_comes_again(engine, tmp_path, drops):
    drops(2 * 46)
    engine.log = [(1, at(number), f"line{number}\n") for number in range(1, 6)]
    assert (await text_of(engine, Position(str(tmp_path / "position")))).startswith("line1 line2\n")
    engine.log += [(1, at(number), f"line{number}\n") for number in range(6, 8)]
    assert await text_of(engine, Position(str(tmp_path / "position"))) == "line6 line7"


def read_all(pipe):
    """Return what is in a pipe."""
    with contextlib.suppress(BlockingIOError):
        return os.read(pipe, 1 << 20)
    return b""


async def test_a_helper_that_ends_while_nobody_reads_has_moved_each_line_whole_or_not_at_all(
    engine, tmp_path, monkeypatch
):
    lines = [f"line {number:06} {'x' * (number % 61)}\n" for number in range(30_000)]  # more than a pipe holds
    engine.log = [(1, at(number), line) for number, line in enumerate(lines)]
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    waits_for_room = asyncio.Event()
    with monkeypatch.context() as patch:
        patch.setattr(asyncio.get_running_loop(), "add_writer", lambda *_: waits_for_room.set())
        position = Position(str(tmp_path / "position"))
        killed = asyncio.create_task(forward(engine.connection, "some", writing, position, lambda: False))
        await waits_for_room.wait()
        killed.cancel()
        await asyncio.wait([killed])
    found = [read_all(reading)]
    position, looks = Position(str(tmp_path / "position")), iter([False, True])
    again = asyncio.create_task(forward(engine.connection, "some", writing, position, looks.__next__))
    while not again.done():
        await asyncio.sleep(0.01)
        found.append(read_all(reading))
    os.close(reading)
    os.close(writing)
    assert b"".join(found).decode() == "".join(lines)


# --- an engine that goes wrong ---------------------------------------------------------------------------------------


async def test_of_a_piece_without_end_the_beginning_is_kept_and_what_comes_after_it_is_understood(engine, monkeypatch):
    monkeypatch.setattr(engine_module, "_LONGEST", 50)
    engine.log = [(1, at(1), "x" * 100_000), (1, at(2), "after\n")]
    (_, cut), after = await given_out(engine)
    assert cut == b"x" * (50 - len(at(1)) - 1)
    assert after == ("1767323045.000000002", b"after\n")


async def test_output_that_breaks_off_within_a_piece_is_an_engine_that_hung_up(engine):
    engine.log = [(1, at(1), "whole\n")]
    whole = frame(1, f"{at(1)} whole\n")

    async def logs(request):
        return web.Response(body=whole + whole[:-3])

    engine.answer = logs
    with pytest.raises(Refused) as refusal:
        await given_out(engine)
    assert refusal.value.code == "docker_unreachable"


async def test_an_answer_without_end_is_given_up(engine, monkeypatch):
    monkeypatch.setattr(engine_module, "_LARGEST", 1 << 20)
    ended = asyncio.Event()

    async def containers(request):
        answer = web.StreamResponse()
        await answer.prepare(request)
        with contextlib.suppress(ConnectionError):
            while True:
                await answer.write(b" " * 65536)
        ended.set()
        return answer

    engine.answer = containers
    with pytest.raises(Refused) as refusal:
        await engine.connection.containers("label")
    assert refusal.value.code == "docker_refused"
    await ended.wait()


async def test_an_error_without_a_message_is_told_as_it_came(engine):
    async def error(request):
        return web.json_response({"cause": "full"}, status=500)

    engine.answer = error
    with pytest.raises(Refused, match="full") as refusal:
        await engine.connection.containers("label")
    assert refusal.value.code == "docker_refused"


async def test_the_end_of_a_container_can_be_waited_for_longer_than_any_answer(engine, monkeypatch):
    async def ended(request):
        await asyncio.sleep(1.5)
        return web.json_response({"StatusCode": 0})

    engine.answer = ended
    monkeypatch.setattr(engine_module, "_WITHIN", 1)
    async with connected(engine.path) as hasty:
        await hasty.wait("some", within=60)


async def test_an_event_that_makes_no_sense_is_nobodys(engine):
    async def events(request):
        lines = [b"{}", b"[", b"7", b'{"Actor": 3}', b"x" * (3 << 20), b'{"id": "one"}', b'{"Actor": {"ID": "two"}}']
        return web.Response(body=b"".join(line + b"\n" for line in lines))

    engine.answer = events
    found = [identity async for identity in engine.connection.events("oom", "label")]
    assert [identity for identity in found if identity] == ["one", "two"]


async def test_an_engine_that_is_away_is_asked_less_and_less_often(tmp_path, monkeypatch):
    class Away:
        @contextlib.asynccontextmanager
        async def output(self, container, since):
            raise Refused("docker_unreachable", "Start it.")
            yield

    pauses = []

    async def sleep(seconds):
        pauses.append(seconds)
        if len(pauses) == 6:
            raise asyncio.CancelledError

    monkeypatch.setattr(asyncio, "sleep", sleep)
    pipe = os.open("/dev/null", os.O_WRONLY)
    with pytest.raises(asyncio.CancelledError):
        await forward(Away(), "some", pipe, Position(str(tmp_path / "position")), lambda: False)
    os.close(pipe)
    assert pauses == [0.4, 0.8, 1.6, 2, 2, 2]
