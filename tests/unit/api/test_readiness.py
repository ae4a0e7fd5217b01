"""How often a worker that starts is looked for: its start waits for no look, and the looks cost next to nothing."""

import asyncio
import itertools

import pytest

from blockyard_api.backends.worker_socket import NotListening
from blockyard_api.workers import readiness


class Starting:
    """A worker that never comes to listen; each look at it is noted with its time."""

    def __init__(self, gives_up_after):
        self.now, self.looks, self._last = 0.0, [], gives_up_after

    async def connect(self):
        self.looks.append(self.now)
        if self.now > self._last:
            raise TimeoutError
        raise NotListening("not yet")

    async def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def looked_for(monkeypatch):
    """A function that gives the times at which a worker is looked for that takes so many seconds."""

    def looks(seconds):
        worker = Starting(seconds)
        with monkeypatch.context() as patched:
            patched.setattr(asyncio, "sleep", worker.sleep)
            with pytest.raises(TimeoutError):
                asyncio.run(readiness.answers(worker))
        return worker.looks

    return looks


def test_a_start_is_seen_a_hundredth_of_it_late_and_never_more_than_that_and_a_moment(looked_for):
    looks = looked_for(60)
    assert all(later - sooner <= 0.01 * sooner + 0.005 + 1e-9 for sooner, later in itertools.pairwise(looks))


def test_a_start_of_half_a_second_is_looked_at_every_ten_milliseconds(looked_for):
    looks = looked_for(0.5)
    assert 50 <= len(looks) <= 100


def test_a_start_that_takes_forty_times_as_long_is_not_looked_at_forty_times_as_often(looked_for):
    assert len(looked_for(20)) < 6 * len(looked_for(0.5))
