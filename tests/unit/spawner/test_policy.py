"""Root's configuration against a request: what is granted, and what is refused."""

import pytest

from blockyard_spawner import policy
from blockyard_spawner.config import KEYS, ConfigError, DataMount
from blockyard_spawner.protocol import Limits, Refused, Spawn


def configured(**changes):
    return {name: key.default for name, key in KEYS.items()} | {
        name.replace("__", "."): v for name, v in changes.items()
    }


def request(**fields):
    return Spawn(**{"seq": 1, "id": "worker0001", "kind": "app", "app": "demo", "bundle": "b1"} | fields)


def test_the_defaults_are_sound():
    policy.check(configured())


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"process__worker_uid_range_start": 61000, "process__worker_uid_range_end": 60000}, "worker_uid_range_end"),
        ({"storage__bundle_worker_path": "/usr/app"}, "bundle_worker_path"),
        ({"storage__bundle_worker_path": "/"}, "bundle_worker_path"),
        ({"storage__bundle_worker_path": "/tmp"}, "bundle_worker_path"),
        ({"storage__bundle_worker_path": "/data/x"}, "bundle_worker_path"),
        ({"server__worker_env": {"R_LIBS": "/x"}}, "R_LIBS"),
        ({"server__worker_env": {"LD_PRELOAD": "/x"}}, "LD_PRELOAD"),
        ({"server__worker_env": {"BLOCKYARD_SOCKET": "/x"}}, "BLOCKYARD_SOCKET"),
        ({"server__default_memory_limit": 2, "process__memory_ceiling": 1}, "memory"),
        ({"server__default_cpu_limit": 2, "process__cpu_ceiling": 1}, "cpu"),
    ],
)
def test_an_impossible_configuration_is_refused_by_name(changes, word):
    with pytest.raises(ConfigError, match=word):
        policy.check(configured(**changes))


@pytest.mark.parametrize(
    ("asked", "default", "ceiling", "granted"),
    [
        (None, None, None, None),
        (5, None, None, 5),
        (None, 5, None, 5),
        (None, None, 9, 9),
        (5, 7, 9, 5),
        (None, 7, 9, 7),
        (9, None, 9, 9),
    ],
)
def test_a_limit_is_what_was_asked_or_the_default_or_the_ceiling(asked, default, ceiling, granted):
    config = configured(server__default_memory_limit=default, process__memory_ceiling=ceiling)
    assert policy.authorize(config, request(limits=Limits(memory=asked))).limits.memory == granted


@pytest.mark.parametrize("name", ["memory", "cpu", "pids", "tmp"])
def test_no_limit_goes_above_its_ceiling(name):
    ceilings = ("process__memory_ceiling", "process__cpu_ceiling", "process__pids_limit", "process__tmp_size")
    config = configured(**dict.fromkeys(ceilings, 100))
    with pytest.raises(Refused, match=name) as refusal:
        policy.authorize(config, request(limits=Limits(**{name: 101})))
    assert refusal.value.code == "limit_above_ceiling"


def test_processes_and_tmp_are_always_limited():
    limits = policy.authorize(configured(), request()).limits
    assert (limits.pids, limits.tmp) == (512, 256 << 20)


def test_the_peers_names_become_names_below_the_state_directory():
    launch = policy.authorize(configured(storage__state_dir="/state"), request(library="l1"))
    assert [(source.root, source.name, source.target, source.writable) for source in launch.sources] == [
        ("/state", "bundles/b1", "/app", False),
        ("/state", "libraries/l1", "/library", False),
    ]
    assert launch.env["R_LIBS"] == "/library"


def test_data_comes_from_roots_list_alone_and_once():
    mounts = {"m": DataMount("m", "/srv/m", writable=True)}
    launch = policy.authorize(configured(storage__data_mounts=mounts), request(data=("m", "m")))
    assert [(source.root, source.target, source.writable) for source in launch.sources[1:]] == [
        ("/srv/m", "/data/m", True)
    ]
    with pytest.raises(Refused) as refusal:
        policy.authorize(configured(), request(data=("m",)))
    assert refusal.value.code == "no_such_data"


READ_AT_START = ["PATH", "HOME", "LD_PRELOAD", "R_PROFILE", "R_LIBS", "BASH_ENV", "TZ", "MYAPP_X", "XAPP_Y", "app_z"]
OURS = ["BLOCKYARD_APP", "BLOCKYARD_WORKER", "BLOCKYARD_SCRATCH", "BLOCKYARD_SOCKET"]


@pytest.mark.parametrize("name", [*READ_AT_START, *OURS])
def test_the_peer_sets_no_variable_that_a_program_reads_at_its_start(name):
    with pytest.raises(Refused) as refusal:
        policy.authorize(configured(), request(env={name: "x"}))
    assert refusal.value.code == "env_not_allowed"


def test_roots_environment_wins_over_the_peers():
    config = configured(server__worker_env={"APP_MODE": "root"})
    assert policy.authorize(config, request(env={"APP_MODE": "peer"})).env["APP_MODE"] == "root"


@pytest.mark.parametrize(
    ("root", "asked", "granted"), [("host", None, "host"), ("host", "none", "none"), ("none", None, "none")]
)
def test_the_network_is_the_apps_or_roots(root, asked, granted):
    assert policy.authorize(configured(process__network=root), request(network=asked)).network == granted


@pytest.mark.parametrize("fields", [{"kind": "shell"}, {"kind": "build"}, {"bundle": None}])
def test_only_the_one_kind_of_worker_is_started(fields):
    with pytest.raises(Refused) as refusal:
        policy.authorize(configured(), request(**fields))
    assert refusal.value.code == "unknown_kind"
