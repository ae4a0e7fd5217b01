"""Fixtures: one pair shared by a module's tests, or one of its own for a test that breaks things."""

import pytest
from running_pair import Pair


@pytest.fixture(scope="module")
def pair(request):
    with Pair(request.module.__name__.rpartition(".")[2]) as running:
        yield running


@pytest.fixture
def own_pair(request):
    """A function that starts a pair with given settings; it is taken down after the test."""
    started = []

    def start(settings="", **options):
        running = Pair(request.node.name, settings, **options)
        started.append(running)
        return running.__enter__()

    yield start
    for running in started:
        running.__exit__()
