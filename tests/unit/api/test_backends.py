"""Two spawners behind one daemon: an app's workers are where it says, and one that is away costs its own apps alone."""

import asyncio
import tempfile

import pytest
from fake_spawner import FakeSpawner
from running_control import until

from blockyard_api.workers.life import State


@pytest.fixture
async def docker():
    with tempfile.TemporaryDirectory(prefix="by-") as root:
        spawner = FakeSpawner(f"{root}/d.sock", f"{root}/run")
        spawner.start()
        yield spawner
        await spawner.close()


def lines(docker, more=""):
    return f'docker.spawner_socket = "{docker.path}"\ndocker.runtime_dir = "{docker.runtime_dir}"\n{more}'


async def test_an_app_runs_where_it_says_and_others_where_the_server_says(start, docker):
    control = await start(lines(docker))
    await control.app("plain")
    await control.app("contained", backend="docker")
    await control.visit("plain")
    await control.visit("contained")
    assert [worker.request.app for worker in control.spawner.running()] == ["plain"]
    (contained,) = docker.running()
    assert (contained.request.app, contained.request.access) == ("contained", "public")


async def test_the_servers_backend_counts_where_an_app_names_none(start, docker):
    control = await start(lines(docker, 'server.backend = "docker"'))
    await control.app("plain")
    await control.visit("plain")
    assert docker.running("plain")
    assert not control.spawner.running()


@pytest.mark.parametrize("change", [{"backend": None}, {"access_type": "logged_in"}], ids=["backend", "runtime"])
async def test_an_app_that_moves_drains_the_workers_it_has(start, docker, change):
    control = await start(lines(docker))
    await control.app("plain", backend="docker")
    worker = control.worker_of(await control.visit("plain"))
    await control.change("plain", **change)
    assert worker.state is State.DRAINING


async def test_workers_of_both_are_taken_over_and_strays_of_both_are_ended(start, docker):
    control = await start(lines(docker))
    await control.app("plain")
    await control.app("contained", backend="docker")
    await control.visit("plain")
    await control.visit("contained")
    known = {worker.id for worker in control.fleet.all()}
    await control.quiet()
    await control.stop_daemon()
    await control.start_daemon()
    assert {worker.id for worker in control.fleet.all()} == known
    await control.fleet.sweep()
    assert len(docker.running()) == len(control.spawner.running()) == 1


async def test_a_backend_that_is_away_at_the_start_costs_its_own_apps_alone_and_its_workers_are_found_later(
    start, docker
):
    control = await start(lines(docker, 'proxy.health_interval = "100ms"'))
    await control.app("plain")
    await control.app("contained", backend="docker")
    await control.visit("contained")
    (before,) = [worker.id for worker in control.fleet.all()]
    await control.quiet()
    await control.stop_daemon()
    docker.stop()
    await control.start_daemon()
    await control.visit("plain")
    assert before not in {worker.id for worker in control.fleet.all()}
    docker.start()
    await until(lambda: control.fleet.find(before) is not None, "the takeover")
    assert docker.workers[before].running


async def test_a_session_on_a_backend_that_is_away_at_the_start_is_found_with_its_worker(start, docker):
    control = await start(lines(docker, 'proxy.health_interval = "100ms"'))
    await control.app("contained", backend="docker")
    visitor = await control.visit("contained")
    before = control.worker_of(visitor).id
    await control.quiet()
    await control.stop_daemon()
    docker.stop()
    await control.start_daemon()
    await asyncio.sleep(0.3)  # some rounds of housekeeping, which write down whose session is over
    docker.start()
    await until(lambda: control.fleet.find(before) and control.fleet.find(before).slots, "the takeover")
    stranger = await control.visit("contained")
    assert control.worker_of(stranger).id != before
    again = await control.visit("contained", cookie=visitor.cookie)
    assert control.worker_of(again).id == before


async def test_a_worker_that_was_started_for_others_gets_no_stranger_after_a_restart(start, docker):
    control = await start(lines(docker))
    await control.app("contained", backend="docker")
    await control.change("contained", access_type="logged_in")
    _, token = await control.services.tokens.create("admin", "t")
    worker = control.worker_of(await control.visit("contained", authorization=f"Bearer {token}".encode()))
    await control.quiet()
    await control.change("contained", access_type="public")
    await control.stop_daemon()
    await control.start_daemon()
    found = control.fleet.find(worker.id)
    control.fleet.reconcile(found.app_id)
    assert (found.access, found.state) == ("logged_in", State.DRAINING)
    await control.change("contained", max_sessions_per_worker=2)
    assert control.worker_of(await control.visit("contained")).id != worker.id
