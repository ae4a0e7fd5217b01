"""A Docker worker as what the engine is told: a change of policy is a visible change of the golden file."""

import ipaddress
import json
from collections import deque
from pathlib import Path

import pytest

from blockyard_spawner import config as base
from blockyard_spawner import policy
from blockyard_spawner.config import ConfigError, DataMount
from blockyard_spawner.docker import config, container
from blockyard_spawner.docker.networks import Networks
from blockyard_spawner.docker.workers import check_runtimes
from blockyard_spawner.protocol import Limits, Spawn

GOLDEN = Path(__file__).with_name("golden.json")
DEFAULTS = {name: key.default for name, key in {**base.KEYS, **config.KEYS}.items()}


def described(settings=(), **fields):
    values = DEFAULTS | dict(settings)
    request = Spawn(1, **{"id": "worker0001", "kind": "app", "app": "demo", "bundle": "b1"} | fields)
    launch = policy.authorize(values, request)
    marks = [f"65024:{number}" for number in range(len(launch.sources))]
    return container.described(values, launch, "net1", marks, "local")


def test_the_whole_description_is_the_golden_one():
    found = described(
        {"storage.data_mounts": {"models": DataMount("models", "/srv/models", writable=True)}},
        library="l1",
        data=("models",),
        limits=Limits(memory=1 << 30, cpu=1500),
        env={"APP_MODE": "test"},
    )
    text = json.dumps(found, indent=1, sort_keys=True).replace(container.PROGRAMS, "PROGRAMS") + "\n"
    assert text == GOLDEN.read_text()


@pytest.mark.parametrize(
    "extra", [{}, {"library": "l1"}, {"scratch_copy": True}, {"limits": Limits(memory=1 << 30)}, {"access": "public"}]
)
def test_nothing_that_can_be_asked_for_gives_more_than_the_bundle_and_a_library(extra):
    host = described(**extra)["HostConfig"]
    assert not {"Privileged", "CapAdd", "Devices", "Binds", "PidMode", "VolumesFrom", "Sysctls", "PortBindings"} & set(
        host
    )
    assert [mount["Target"] for mount in host["Mounts"] if not mount["ReadOnly"]] == ["/run/worker"]
    assert host["CapDrop"] == ["ALL"]
    assert host["SecurityOpt"] == ["no-new-privileges"]


def test_no_destination_of_a_mount_lies_below_another():
    targets = [mount["Target"] for mount in described(library="l1")["HostConfig"]["Mounts"]]
    assert not [(one, other) for one in targets for other in targets if one != other and other.startswith(f"{one}/")]


def test_root_alone_chooses_the_runtime():
    settings = {"docker.runtime": "runc", "docker.runtime_defaults": {"public": "kata-runtime"}}
    chosen = [described(settings, access=access)["HostConfig"]["Runtime"] for access in ("public", "acl", None)]
    assert chosen == ["kata-runtime", "runc", "runc"]


def test_a_runtime_that_is_not_there_is_named_with_those_that_are():
    values = DEFAULTS | {"docker.runtime": "kata"}
    with pytest.raises(ConfigError, match=r"'docker.runtime' is kata, .* it has crun, runc\."):
        check_runtimes(values, {"Runtimes": {"runc": {}, "crun": {}}})
    check_runtimes(DEFAULTS, {"Runtimes": {}})


def test_the_pool_is_cut_into_one_network_for_each_worker():
    values = DEFAULTS | {"docker.network_pool": config.pool("10.9.0.0/27")}
    assert container.subnets(values) == ["10.9.0.0/28", "10.9.0.16/28"]
    assert len(container.subnets(DEFAULTS)) == 4096


def test_containers_in_a_workers_network_may_talk_only_where_there_are_sidecars():
    option = "com.docker.network.bridge.enable_icc"
    assert container.network(DEFAULTS, "w", "a", "10.9.0.0/28")["Options"][option] == "false"
    with_sidecars = DEFAULTS | {"docker.service_network": "services"}
    assert container.network(with_sidecars, "w", "a", "10.9.0.0/28")["Options"][option] == "true"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("docker.network_pool", "10.213.0.0/29"),
        ("docker.network_pool", "10.213.0.1/16"),
        ("docker.network_pool", "fd00::/64"),
        ("docker.image", "--privileged"),
        ("docker.runtime", "a b"),
        ("docker.runtime_defaults", {"everybody": "runc"}),
        ("docker.socket", "docker.sock"),
    ],
)
def test_a_wrong_value_is_refused(key, value):
    with pytest.raises(ValueError, match=r"^an? "):
        config.KEYS[key].parse(value)


def test_a_network_that_is_told_with_the_hosts_part_of_its_address_takes_its_subnet_all_the_same():
    networks = Networks(DEFAULTS, None)
    networks.adopt([{"Id": "bridge", "IPAM": {"Config": [{"Subnet": "10.213.0.17/16"}]}}])
    assert networks.free == deque()


@pytest.mark.parametrize(
    ("taken", "left"),
    [
        ("10.9.0.16/28", ["10.9.0.0/28", "10.9.0.32/28", "10.9.0.48/28"]),
        ("10.9.0.24/29", ["10.9.0.0/28", "10.9.0.32/28", "10.9.0.48/28"]),
        ("10.9.0.32/27", ["10.9.0.0/28", "10.9.0.16/28"]),
        ("10.0.0.0/8", []),
        ("10.9.1.0/24", ["10.9.0.0/28", "10.9.0.16/28", "10.9.0.32/28", "10.9.0.48/28"]),
        ("fd00::/64", ["10.9.0.0/28", "10.9.0.16/28", "10.9.0.32/28", "10.9.0.48/28"]),
    ],
)
async def test_what_a_network_takes_of_the_pool_no_worker_gets_and_a_workers_own_comes_back(taken, left):
    class Engine:
        async def remove_network(self, network):
            pass

    networks = Networks(DEFAULTS | {"docker.network_pool": config.pool("10.9.0.0/26")}, Engine())
    for _ in range(2):  # as after an attempt in which the engine went away
        networks.adopt([{"Id": "one", "IPAM": {"Config": [{"Subnet": taken}]}}])
    assert list(networks.free) == left
    await networks.remove("one")
    assert len(networks.free) == len(left) + (taken == "10.9.0.16/28")


def test_a_thousand_networks_are_adopted_without_a_search_through_the_pool_for_each(monkeypatch):
    networks, parsed = Networks(DEFAULTS, None), []
    read = ipaddress.ip_network
    monkeypatch.setattr(ipaddress, "ip_network", lambda *args, **more: parsed.append(args) or read(*args, **more))
    mine = [{"Id": str(number), "IPAM": {"Config": [{"Subnet": part}]}} for number, part in enumerate(networks.free)]
    networks.adopt(mine[:1000])
    assert len(networks.free) == 3096
    assert len(parsed) <= 2000
