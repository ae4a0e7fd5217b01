"""A probe that did not run, or not to its end, is never taken for one that reached nothing."""

import asyncio
import json
import os
import shutil
import socket
import tempfile
from pathlib import Path

import pytest
from fake_spawner import FakeSpawner
from running_control import until

from blockyard_api.backends.spawner import Spawner
from blockyard_api.checks.probe import ProbeFailed, Prober, Target
from blockyard_api.checks.result import Severity
from blockyard_api.settings import Endpoint

TARGETS = [Target("one", Endpoint("127.0.0.1", 1)), Target("two", Endpoint(path="/two"), ping=True)]
BEGAN = {"uid": 7, "gid": 8, "pid": 9, "seccomp": 2, "landlock": 3, "typing": "EPERM"}


def began(env):
    return {"began": env["BLOCKYARD_PROBE_NONCE"], **BEGAN}


def sight(index, *, reached=False):
    return {"target": index, "reached": reached, "failure": "" if reached else "timeout", "answer": ""}


def ended(env):
    return {"ended": env["BLOCKYARD_PROBE_NONCE"], "targets": 2}


class Host(FakeSpawner):
    """A spawner whose probes say what the test has them say, and then go on living."""

    def __init__(self, *where):
        super().__init__(*where)
        self.report = lambda env: []
        self.exits = False
        self.serves = False  # a probe listens before it says a word, and speaks no HTTP
        self.listeners = []

    def _spawn(self, request, descriptors):
        answer = super()._spawn(request, descriptors)
        self.listeners.append(socket.socket(socket.AF_UNIX))
        self.listeners[-1].bind(str(self.socket_of(request.id)))
        self.listeners[-1].listen()
        for line in self.report(request.env):
            os.write(
                self.workers[request.id].log, (line if isinstance(line, str) else json.dumps(line)).encode() + b"\n"
            )
        if self.exits:
            asyncio.get_running_loop().call_later(0.05, self.exit, request.id, 1)
        return answer


@pytest.fixture
async def host():
    root = Path(tempfile.mkdtemp(prefix="by-"))
    spawner = Host(root / "s.sock", root / "run")
    spawner.start()

    async def cannot_revive():
        return False

    spawner.client = Spawner(str(spawner.path), cannot_revive)
    spawner.prober = Prober(spawner.client, str(spawner.runtime_dir), 6.0)
    yield spawner
    spawner.client.close()
    assert not spawner.prober.running
    assert not spawner.running()
    await spawner.close()
    for listener in spawner.listeners:
        listener.close()
    shutil.rmtree(root)


async def test_a_complete_report_is_told_whatever_the_sandbox_says_besides(host):
    host.report = lambda env: ["a warning", began(env), sight(0), "another", sight(1, reached=True), ended(env)]
    report = await host.prober.probe(TARGETS, "host")
    assert [report.sights[target].reached for target in TARGETS] == [False, True]
    assert (report.peer.uid, report.inner_uid, report.landlock) == (os.getuid(), 7, 3)


async def test_targets_that_are_too_many_for_one_variable_are_split(host):
    many = [Target("listener", Endpoint("127.0.0.1", port)) for port in range(1000, 1500)]
    host.report = lambda env: [began(env), *(sight(index) for index in range(500)), ended(env)]
    await host.prober.probe(many, "none")
    env = host.requests[-2].env if hasattr(host.requests[-2], "env") else host.requests[-1].env
    parts = [env[f"BLOCKYARD_PROBE_TARGETS_{number}"] for number in range(len(env) - 1)]
    assert len(parts) > 1
    assert max(map(len, parts)) <= 4096
    assert json.loads("".join(parts))[499] == {"host": "127.0.0.1", "port": 1499}


@pytest.mark.parametrize(
    ("report", "words"),
    [
        (lambda env: [], "it said nothing"),
        (lambda env: ["bwrap: No permissions to create a new namespace"], "bwrap: No permissions"),
        (lambda env: ["Traceback (most recent call last):", "ImportError: no json"], "ImportError"),
        (lambda env: [began(env)], "complete"),
        (lambda env: [began(env), sight(0)], "complete"),
        (lambda env: [began(env), sight(0), sight(1)], "complete"),
        (
            lambda env: [began({"BLOCKYARD_PROBE_NONCE": "0" * 32}), sight(0), sight(1), ended(env)],
            "not what was asked",
        ),
        (lambda env: [began(env), sight(1), sight(0), ended(env)], "not what was asked"),
        (lambda env: [began(env), sight(0), ended(env)], "not what was asked"),
        (lambda env: [began(env), sight(0), sight(1), ended({"BLOCKYARD_PROBE_NONCE": ""})], "not what was asked"),
        (lambda env: ["x" * 60_000], "complete"),
    ],
)
async def test_a_report_that_is_not_whole_is_none(host, report, words):
    host.report, host.exits = report, True
    with pytest.raises(ProbeFailed) as caught:
        await host.prober.probe(TARGETS, "host")
    assert words in caught.value.message
    assert caught.value.result("worker_egress").severity is Severity.ERROR


async def test_a_probe_that_does_not_come_to_its_end_is_given_up_and_ended(host):
    host.prober = Prober(host.client, str(host.runtime_dir), 0.2)
    host.report = lambda env: [began(env), sight(0)]
    with pytest.raises(ProbeFailed, match="did not end") as caught:
        await host.prober.probe(TARGETS, "host")
    assert caught.value.passing


async def test_a_probe_that_is_refused_says_why(host):
    host.refuse = ("no_cgroup", "Run 'systemctl start blockyard-workers'.")
    with pytest.raises(ProbeFailed, match="systemctl start blockyard-workers") as caught:
        await host.prober.probe(TARGETS, "host")
    result = caught.value.result("user_namespaces")
    assert (result.severity, result.passing) == (Severity.ERROR, False)


async def test_a_pool_without_a_free_uid_is_no_reason_to_stay_away(host):
    host.refuse = ("uid_pool_exhausted", "Stop a worker.")
    with pytest.raises(ProbeFailed) as caught:
        await host.prober.probe(TARGETS, "host")
    assert caught.value.result("user_namespaces").severity is Severity.WARNING


async def test_without_a_spawner_the_failure_may_pass(host):
    host.hang_up = {"hello"}
    with pytest.raises(ProbeFailed) as caught:
        await host.prober.probe(TARGETS, "host")
    assert caught.value.passing


async def test_a_probe_whose_caller_goes_away_is_ended_all_the_same(host):
    host.report = lambda env: [began(env)]
    probing = asyncio.create_task(host.prober.probe(TARGETS, "host"))
    await until(host.running, "a probe")
    assert host.prober.running == {worker.id for worker in host.running()}
    probing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await probing
    await until(lambda: not host.running() and not host.prober.running, "its end")
