"""The line that sums up what apps are isolated by follows from what the probes saw, and from nothing else."""

from dataclasses import replace

import pytest

from blockyard_api.backends.peer import Peer
from blockyard_api.checks.docker import judged_socket
from blockyard_api.checks.isolation import in_one_line
from blockyard_api.checks.network import METADATA
from blockyard_api.checks.probe import ProbeFailed, Report, Sight, Target
from blockyard_api.checks.result import ok
from blockyard_api.settings import Endpoint

POOL = range(60000, 61000)
ABSTRACT = Target("an abstract socket", Endpoint(), abstract="x")
SPAWNER = Target("the spawner", Endpoint(path="/run/blockyard/spawner.sock"))
REDIS = Target("redis", Endpoint("127.0.0.1", 6379), ping=True)
UNUSED = ok("docker_socket", "No app uses the Docker backend.")
REACHED, REFUSED = Sight(True, "", ""), Sight(False, "ECONNREFUSED", "")
ALL = "uid, processes, files, system calls, memory, CPU, number of processes, network, abstract sockets"
ALL += ", this host's services and the cloud's credentials"


def report(**changed):
    sights = {METADATA[0]: REFUSED, SPAWNER: Sight(False, "ENOENT", ""), ABSTRACT: REFUSED, REDIS: REFUSED}
    sound = Report(
        uid=60007, cgroup="/workers/x", peer=Peer(4711, 60007, 60000), inner_uid=60007, inner_gid=60000, inner_pid=2,
        filtered=True, typing="EPERM", landlock=7, controllers=("cpu", "memory", "pids"),
        sights=sights | changed.pop("sights", {}),
    )  # fmt: skip
    return replace(sound, **changed)


def told(process=None, docker=None, socket=UNUSED):
    return in_one_line(process, docker, POOL, socket)


def test_where_all_holds_nothing_is_left_out_and_nothing_is_told_as_missing():
    assert told(report()) == f"Apps in bubblewrap: isolated by {ALL}."


@pytest.mark.parametrize(
    ("changed", "missing"),
    [
        ({"peer": Peer(4711, 990, 990), "uid": 990}, "uid"),  # a spawner without root
        ({"peer": Peer(4711, 990, 990)}, "uid"),  # the spawner says one thing, the kernel another
        ({"inner_pid": 4711}, "processes"),
        ({"sights": {SPAWNER: Sight(False, "EACCES", "")}}, "files"),
        ({"sights": {SPAWNER: REACHED}}, "files and this host's services"),
        ({"filtered": False}, "system calls"),
        ({"controllers": ("pids",)}, "memory and CPU"),
        ({"controllers": ()}, "memory, CPU and number of processes"),
        ({"sights": {ABSTRACT: REACHED}}, "network and abstract sockets"),
        ({"sights": {ABSTRACT: Sight(False, "EPERM", "")}}, "network"),  # the kernel keeps abstract sockets apart
        ({"sights": {REDIS: REACHED}}, "this host's services"),
        ({"sights": {METADATA[0]: REACHED}}, "the cloud's credentials"),
    ],
)
def test_what_does_not_hold_is_told_and_nothing_else(changed, missing):
    assert told(report(**changed)).endswith(f"; not isolated by {missing}.")


def test_each_backend_that_is_used_is_told_and_what_the_engines_socket_is_worth():
    in_docker = report(uid=65534, peer=Peer(4712, 65534, 65534))
    helper = judged_socket("/run/docker.sock", api_may_use_it=False, refusal=None)
    line = told(report(), in_docker, helper)
    assert line.startswith("Apps in bubblewrap: isolated by uid, ")
    assert " Apps in Docker: isolated by processes, " in line
    assert (
        "; not isolated by uid. The Docker helper has the container engine's socket, which is root on this host."
        in line
    )
    assert "bubblewrap" not in told(None, in_docker, helper)


def test_an_api_that_has_the_engines_socket_is_told_whatever_apps_use():
    has_it = judged_socket("/run/docker.sock", api_may_use_it=True, refusal=None)
    assert told(report(), None, has_it).endswith(
        "The API has the container engine's socket, which is root on this host."
    )


def test_what_no_probe_saw_is_not_known():
    line = told(ProbeFailed("it did not start."), report())
    assert line.startswith("Apps in bubblewrap: not known, since the probe did not run. Apps in Docker: isolated by")


def test_it_is_one_line():
    assert "\n" not in told(report(), report())
