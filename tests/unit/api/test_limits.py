"""What a worker ran into, in its owner's words; and the kernel's word on it, from files as a cgroup has them."""

from pathlib import Path

import pytest

from blockyard_api import settings
from blockyard_api.host import accounting
from blockyard_api.host.accounting import Hits
from blockyard_api.workers.limits import Limits

PROCESS = settings.load("/nonexistent", {}).process


@pytest.fixture
def limits():
    return Limits(PROCESS)


def test_refused_processes_are_told_once_with_the_limit_that_stood_there(limits):
    assert list(limits.heard(Hits(process_limit=64))) == []
    assert list(limits.heard(Hits(1, 64))) == ["could not start more than 64 processes"]
    assert list(limits.heard(Hits(900, 64))) == []
    assert limits.all(0) == ["could not start more than 64 processes"]
    assert limits.before_its_end() == " after it could not start more than 64 processes"


def test_what_was_hit_is_not_forgotten_when_the_counters_are_gone(limits):
    list(limits.heard(Hits(3, 64, 2, 0)))
    list(limits.heard(Hits()))
    assert limits.hits == Hits(3, 64, 2, 0)


@pytest.mark.parametrize(
    ("hits", "server"), [(Hits(0, 64, 1, 2), False), (Hits(0, 64, 0, 2), True), (Hits(0, 64, 0, 0), False)]
)
def test_a_worker_that_died_of_others_memory_is_told_from_one_that_died_of_its_own(limits, hits, server):
    list(limits.heard(hits))
    assert limits.server_was_full is server


def test_errors_that_the_sandbox_alone_knows_of_are_explained_once(limits):
    words = b"Error in file(): cannot open '/tmp/x': No space left on device"
    assert list(limits.saw(words)) == ["ran out of room for files: its /tmp holds at most 256 MB"]
    assert list(limits.saw(words)) == []
    assert list(limits.saw(b"Too many open files")) == ["could not open more files at once"]
    assert len(limits.all(0)) == 2


def test_waiting_for_the_processor_is_told_seldom_and_shown_always(limits):
    assert list(limits.was_held_back(3)) == []
    assert limits.all(0) == ["had to wait 3 s for its share of the processor"]
    assert list(limits.was_held_back(12)) == ["had to wait 12 s for its share of the processor"]
    assert list(limits.was_held_back(40)) == []
    assert len(list(limits.was_held_back(50))) == 1


def test_a_log_that_misses_bytes_is_said_to(limits):
    assert limits.all(77) == ["wrote more than is kept: 77 bytes of its log were dropped"]


CGROUP = {
    "pids.events": "max 7\n",
    "pids.max": "512\n",
    "memory.events": "low 0\nhigh 0\nmax 12\noom 2\noom_kill 3\noom_group_kill 1\n",
    "memory.max": "max\n",
    "memory.current": "4096\n",
    "memory.stat": "anon 1\nslab 333\n",
    "cpu.stat": "usage_usec 5\nnr_periods 2\nnr_throttled 1\nthrottled_usec 40\n",
}


def test_counters_are_read_as_the_kernel_writes_them(tmp_path):
    for name, text in CGROUP.items():
        (tmp_path / name).write_text(text)
    assert accounting.hits(tmp_path) == Hits(7, 512, 2, 3)
    assert accounting.usage(tmp_path) == accounting.Usage(5, 4096, None, 40, 333)


def test_what_is_not_there_is_unknown(tmp_path):
    assert accounting.hits(tmp_path / "gone") == Hits()
    assert accounting.usage(tmp_path / "gone") == accounting.Usage()
    assert accounting.usage(None) == accounting.Usage()


async def test_without_controllers_nothing_is_told_and_nothing_fails(tmp_path):
    heard = []
    with accounting.told_of_hits(tmp_path, heard.append), accounting.told_of_hits(None, heard.append):
        pass
    assert set(heard) == {Hits()}


def test_the_room_for_files_is_told_as_a_share(tmp_path):
    assert 0 < accounting.files_left(str(tmp_path)) <= 1
    assert accounting.files_left(str(Path(tmp_path, "gone"))) == 1
