"""Workers' logs: reading never stops, size is capped, followers see everything that is kept."""

import asyncio
import os
import re
import time

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


NOTE = re.compile(rb"\[blockyard [^]]+\] (\d+) bytes were dropped: more than 1 MB a second\n")


async def test_a_flood_is_read_to_its_end_and_what_is_over_the_rate_is_dropped_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(log, "BURST", 1 << 20)
    written = [bytes([65 + i % 26]) * 65535 + b"\n" for i in range(160)]
    began = time.monotonic()
    kept = await pumped(Logs(tmp_path), *written)
    most = log.BURST + (time.monotonic() - began) * log.RATE
    text = await whole(kept)
    dropped = [int(number) for number in NOTE.findall(text)]
    app_s_own = NOTE.sub(b"", text)
    assert dropped
    assert sum(dropped) >= 2 << 20
    assert len(app_s_own) <= most + 65536
    assert abs(len(app_s_own) + sum(dropped) - 160 * 65536) <= len(dropped)  # a line that was cut is ended
    assert app_s_own.startswith(written[0])


async def test_a_flood_that_is_over_is_told_although_the_app_says_nothing_more(tmp_path, monkeypatch):
    monkeypatch.setattr(log, "BURST", log.RATE)
    logs = Logs(tmp_path)
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    with logs.writing("w" * 32) as written:
        pumping = asyncio.create_task(log.pump(read_end, written))
        await asyncio.to_thread(os.write, write_end, b"x" * (3 << 20))
        follower = logs.of("w" * 32).read(follow=True)
        async with asyncio.timeout(20):
            text = b""
            while not NOTE.search(text):
                text += await anext(follower)
        await follower.aclose()
        assert written.dropped >= 1 << 19
        os.close(write_end)
        await pumping


async def test_a_slow_writer_loses_nothing_however_long_it_writes(tmp_path, monkeypatch, clock):
    monkeypatch.setattr(log, "BURST", 2 << 20)
    logs = Logs(tmp_path)
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    with logs.writing("w" * 32) as written:
        pumping = asyncio.create_task(log.pump(read_end, written))
        for _ in range(60):
            await asyncio.to_thread(os.write, write_end, b"x" * 65536)
            await clock.advance(1 / 16)
        os.close(write_end)
        await pumping
    assert written.dropped == 0
    assert written.end == 60 * 65536


async def test_the_platform_s_line_begins_a_line_whatever_the_app_left_unfinished(tmp_path):
    with Logs(tmp_path).writing("w" * 32) as written:
        await written.append(b"no end of line")
        await asyncio.gather(written.note("first"), written.note("second"), written.append(b"more\n"))
        lines = (await whole(written)).decode().splitlines()
    assert lines[0] == "no end of line"
    assert [line.partition("] ")[2] for line in lines if line.startswith("[blockyard ")] == ["first", "second"]
    assert "more" in lines


async def test_what_is_kept_is_shown_to_who_explains_it(tmp_path):
    logs = Logs(tmp_path)
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    with logs.writing("w" * 32) as written:
        os.write(write_end, b"cannot write: No space left on device\n")
        os.close(write_end)
        await log.pump(read_end, written, lambda words: ["the disk is full"] if b"No space" in words else [])
        text = await whole(written)
    assert text.startswith(b"cannot write: No space left on device\n[blockyard ")
    assert text.endswith(b"the disk is full\n")
