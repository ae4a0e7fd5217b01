"""The same helper with Podman behind it."""

import pytest
from docker_helper import DockerHelper, engine_group
from running_engine import Podman
from running_spawner import EXAMPLES


@pytest.fixture(scope="module")
def podman():
    with Podman(engine_group()) as running:
        yield running


def test_a_worker_serves_its_app_and_ends_with_nothing_left(podman):
    helper = DockerHelper(podman, pool="10.213.80.0/24")
    try:
        helper.start()
        client = helper.client()
        worker = helper.spawn(client, "worker0001", helper.bundle("hello", EXAMPLES / "hello"))
        assert worker.get().startswith("HTTP/1.1 200 OK")
        assert client.call("stop", id="worker0001", grace=5000)["result"]["reason"] == "stopped"
        code = 'for (i in 1:50) cat("line", i, "\\n"); message(length(list.files("/sys/class/net"))); quit(status = 7)'
        short = helper.run_r(client, "worker0002", code, network="none", limits={"memory": 256 << 20, "cpu": 1000})
        assert helper.result(client, "worker0002")["status"] == 7
        assert [line for line in short.output().splitlines() if line.startswith("line")][-1] == "line 50 "
        assert not helper.leftovers()
    finally:
        helper.remove()
