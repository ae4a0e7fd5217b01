"""Workers' logs: reading never stops, size is capped, followers see everything that is kept."""

import asyncio
import os

from blockyard_api.workers import log
from blockyard_api.workers.log import Logs


async def pumped(logs, *chunks, worker="w" * 32):
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    with logs.writing(worker) as written:
        pumping = asyncio.create_task(log.pump(read_end, written))
        for chunk in chunks:
            await asyncio.to_thread(os.write, write_end, chunk)
        os.close(write_end)
        await pumping
    return logs.of(worker)


async def whole(worker_log, follow=False):
    return b"".join([chunk async for chunk in worker_log.read(follow=follow)])


async def test_what_a_worker_writes_is_kept_after_its_end(tmp_path):
    kept = await pumped(Logs(tmp_path), b"hello\n", b"world\n")
    assert await whole(kept) == b"hello\nworld\n"
    assert await whole(kept, follow=True) == b"hello\nworld\n"


async def test_a_line_of_a_megabyte_does_not_stop_the_reading(tmp_path):
    kept = await pumped(Logs(tmp_path), *[b"x" * 65536] * 16, b"\nafter\n")
    assert (await whole(kept)).endswith(b"x\nafter\n")


async def test_a_log_never_takes_more_than_two_segments(tmp_path, monkeypatch):
    monkeypatch.setattr(log, "SEGMENT", 100_000)
    kept = await pumped(Logs(tmp_path), *[bytes([65 + i % 26]) * 50_000 for i in range(40)], b"the end\n")
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 200_000
    assert (await whole(kept)).endswith(b"the end\n")


async def test_a_follower_sees_what_comes_and_ends_with_the_worker(tmp_path):
    logs = Logs(tmp_path)
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    with logs.writing("a" * 32) as written:
        pumping = asyncio.create_task(log.pump(read_end, written))
        os.write(write_end, b"first\n")
        await asyncio.sleep(0.05)
        follower = asyncio.create_task(whole(logs.of("a" * 32), follow=True))
        await asyncio.sleep(0.05)
        assert not follower.done()
        os.write(write_end, b"second\n")
        os.close(write_end)
        await pumping
        await written.append(b"the platform's last word\n")
    async with asyncio.timeout(5):
        assert await follower == b"first\nsecond\nthe platform's last word\n"


async def test_a_log_goes_on_where_it_was_when_its_pipe_is_taken_over(tmp_path):
    await pumped(Logs(tmp_path), b"before\n")
    assert await whole(await pumped(Logs(tmp_path), b"after\n")) == b"before\nafter\n"


async def test_logs_are_pruned_by_age_but_never_the_one_being_written(tmp_path):
    logs = Logs(tmp_path)
    await pumped(logs, b"old\n")
    os.utime(tmp_path / ("w" * 32 + ".log"), (1, 1))
    await logs.prune(60)
    assert not list(tmp_path.iterdir())
