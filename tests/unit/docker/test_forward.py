"""A Docker worker's output on its way to the API: in what order and how often, and what the engine says in between."""

import asyncio
import os
import struct

import pytest
from aiohttp import web

from blockyard_spawner.docker.engine import connected
from blockyard_spawner.docker.forward import Position, forward

MOMENT = "1767323045.000000001"


def at(nanoseconds):
    return f"2026-01-02T03:04:05.{nanoseconds:09}Z"


def frame(stream, text):
    return struct.pack(">BxxxL", stream, len(text)) + text.encode()


class Engine:
    """Keeps a container's output, in the order in which it came to it, and gives out what is asked for."""

    def __init__(self):
        self.log = []  # (stream, time or nothing, text)
        self.asked = []  # from when on
        self.cuts_first_look_after = None  # that many pieces
        self.drops_all_older = True  # Docker 20.10; newer ones drop only what comes before the first that is new enough

    async def version(self, _):
        return web.json_response({"ApiVersion": "1.41"})

    async def logs(self, request):
        since = request.query["since"]
        self.asked.append(since)
        body, found = b"", False
        shown = self.cuts_first_look_after if len(self.asked) == 1 else None
        for stream, moment, text in self.log[:shown]:
            late = not moment or f"1767323045.{moment[20:29]}" >= since
            found = found or late
            if late or (found and not self.drops_all_older):
                body += frame(stream, f"{moment} {text}" if moment else text)
        return web.Response(body=body, content_type="application/octet-stream")


@pytest.fixture
async def engine(tmp_path):
    keeping = Engine()
    application = web.Application()
    application.add_routes(
        [web.get("/version", keeping.version), web.get("/{version}/containers/some/logs", keeping.logs)]
    )
    runner = web.AppRunner(application)
    await runner.setup()
    path = str(tmp_path / "docker.sock")
    await web.UnixSite(runner, path).start()
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


async def test_what_the_engine_says_of_its_own_is_no_output(engine):
    engine.log = [
        (1, at(1), "one\n"),
        (3, "", "Error grabbing logs: unexpected EOF\n"),
        (1, "", "rotated, it says without a time\n"),
        (2, at(1), "two\n"),
    ]
    assert [data async for _, data in engine.connection.output("some", "0")] == [b"one\n", b"two\n"]


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
    assert [moment async for moment, _ in engine.connection.output("some", "0")] == [meant]


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


def test_output_is_moved_also_where_no_position_can_be_written_down(tmp_path):
    path = tmp_path / "position"
    position = Position(str(path))
    path.symlink_to("/dev/full")
    position.advance(MOMENT)
    assert not position.unmoved()(MOMENT)
