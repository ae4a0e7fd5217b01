"""A Docker worker's output on its way to the API: what the engine says in between, and what cannot be written down."""

import struct

import pytest
from aiohttp import web

from blockyard_spawner.docker.engine import connected
from blockyard_spawner.docker.forward import Position

MOMENT = "2026-01-02T03:04:05.000000001Z"


@pytest.fixture
async def answering(tmp_path):
    """An engine that has this to say of a container's output."""
    frames = [(1, f"{MOMENT} one\n"), (3, "Error grabbing logs: unexpected EOF\n"), (2, f"{MOMENT} two\n")]
    body = b"".join(struct.pack(">BxxxL", stream, len(text)) + text.encode() for stream, text in frames)

    async def version(_):
        return web.json_response({"ApiVersion": "1.41"})

    async def logs(_):
        return web.Response(body=body, content_type="application/octet-stream")

    application = web.Application()
    application.add_routes([web.get("/version", version), web.get("/{version}/containers/some/logs", logs)])
    runner = web.AppRunner(application)
    await runner.setup()
    path = tmp_path / "docker.sock"
    await web.UnixSite(runner, str(path)).start()
    yield str(path)
    await runner.cleanup()


async def test_what_the_engine_says_of_its_own_is_no_output(answering):
    async with connected(answering) as engine:
        assert [data async for _, data in engine.output("some", "0")] == [b"one\n", b"two\n"]


@pytest.mark.parametrize("kept", ["", "Error 1", f"{MOMENT} many", f"{MOMENT} 1 2", "\0"])
def test_a_position_that_makes_no_sense_is_the_beginning(tmp_path, kept):
    path = tmp_path / "position"
    path.write_text(kept)
    assert Position(str(path)).since == "0"


def test_output_is_moved_also_where_no_position_can_be_written_down(tmp_path):
    path = tmp_path / "position"
    position = Position(str(path))
    path.symlink_to("/dev/full")
    position.advance(MOMENT)
    assert position.moment == MOMENT
