"""The rules of `by admin firewall --format docker`, in force: what a Docker worker reaches with them, and without.

The engine's network namespace stands for this machine; one beside it, joined by a pair of interfaces, for all others.
"""

import contextlib
import ctypes
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
UNIT = CHECKOUT / "systemd/blockyard-firewall-docker.service"
BY = Path(sys.executable).parent
HERE, THERE, METADATA = "198.51.100.1", "198.51.100.2", "169.254.169.254"
CLONE_NEWNET = 0x40000000
REDIS, API, OTHER, PUBLISHED = 6379, 8080, 7001, 7777
REACH = """
import json, socket, sys
def said(host, port):
    try:
        socket.create_connection((host, port), 3).close()
        return "reached"
    except OSError as failure:
        return type(failure).__name__
print(json.dumps([said(host, port) for host, port in json.loads(sys.argv[1])]))
"""


class Machine:
    """This machine's network as the engine has it, and a neighbour's."""

    def __init__(self, engine, config):
        self.engine, self.config = engine, config
        self.here, self.there = engine.root / "net", Path(f"/run/netns/blockyard-there-{os.getpid()}")

    def run(self, command, *, place=None, check=True):
        """Run a shell command in the network of this machine, or of the neighbour."""
        done = subprocess.run(
            ["nsenter", f"--net={place or self.here}", "bash", "-o", "pipefail", "-c", command],
            env={**os.environ, "PATH": f"{BY}:{os.environ['PATH']}"},
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def listen(self, place, host, port):
        """Listen there; whoever connects is accepted by the kernel, without end."""

        def enter_and_listen():
            with open(place) as namespace:
                assert ctypes.CDLL(None).setns(namespace.fileno(), CLONE_NEWNET) == 0
            made.append(socket.create_server((host, port)))

        made = []
        thread = threading.Thread(target=enter_and_listen)  # its namespace ends with it
        thread.start()
        thread.join()
        return made[0]

    def __enter__(self):
        with contextlib.ExitStack() as undone:
            self._begin(undone)
            self._open = undone.pop_all()
        return self

    def _begin(self, undone):
        name = self.there.name
        subprocess.run(["ip", "netns", "add", name], check=True)
        undone.callback(subprocess.run, ["ip", "netns", "delete", name], check=True)
        self.run("ip link add outward type veth peer name inward")
        undone.callback(self.run, "ip link delete outward")
        self.run(f"ip link set inward netns {name}")
        self.run(f"ip address add {HERE}/24 dev outward && ip link set outward up")
        self.run(f"ip route add {METADATA} via {THERE}")
        self.run(
            f"ip address add {THERE}/24 dev inward && ip link set inward up && ip link set lo up"
            f" && ip address add {METADATA}/32 dev lo",
            place=self.there,
        )
        listening = ((METADATA, 80), (THERE, REDIS), (THERE, OTHER)), (("0.0.0.0", API), (HERE, OTHER))
        for place, each in zip((self.there, self.here), listening, strict=True):
            for host, port in each:
                undone.enter_context(self.listen(place, host, port))
        translated = f"PREROUTING -d {HERE} -p tcp --dport {PUBLISHED} -j DNAT --to {THERE}:{OTHER}"
        self.run(f"iptables -t nat -A {translated}")
        undone.callback(self.run, f"iptables -t nat -D {translated}")
        undone.callback(self.unload)

    def __exit__(self, *_):
        self._open.close()

    def load(self):
        """Load the rules as an administrator does."""
        self.run(f"by admin firewall --config {shlex.quote(str(self.config))} --format docker --apply-with | sh -e")

    def unload(self):
        self.run(_of_unit("ExecStop")[0], check=False)

    def rules(self):
        return [line for line in self.run("iptables -S").stdout.splitlines() if "BLOCKYARD-DOCKER" in line]


def _of_unit(key):
    """The shell commands of the unit, as systemd hands them over."""
    found = re.findall(rf"^{key}=/bin/bash (?:-e -o pipefail )?-c '(.*)'$", UNIT.read_text(), re.MULTILINE)
    return [command.replace("$$", "$") for command in found]


@pytest.fixture
def machine(engine, docker):
    config = docker.root / "firewall.toml"  # where others than root read it
    config.write_text(
        f'[server]\nbind = "0.0.0.0:{API}"\n[redis]\nurl = "redis://:secret@{THERE}:{REDIS}/0"\n'
        '[docker]\nnetwork_pool = "10.213.80.0/24"\n'
    )
    with Machine(engine, config) as found:
        yield found


@pytest.fixture
def reached(docker, machine):
    """What a worker says of each of the places that are tried."""
    docker.configure(docker={"network_pool": "10.213.80.0/24"})
    docker.start()
    docker.run_r(docker.client(), "worker0001", "repeat { s <- serverSocket(7000); socketAccept(s, timeout = 600) }")
    (network,) = docker.container_of("worker0001")["NetworkSettings"]["Networks"].values()
    places = {
        "metadata": (METADATA, 80),
        "the host's Redis": (THERE, REDIS),
        "the API at the host's address": (HERE, API),
        "the API at the worker's gateway": (network["Gateway"], API),
        "a service at one address of the host": (HERE, OTHER),
        "the host's address, translated": (HERE, PUBLISHED),
        "another host": (THERE, OTHER),
    }

    def ask():
        asked = docker.engine.run(
            "exec", "blockyard-worker0001", "python3", "-c", REACH, json.dumps([*places.values()])
        )
        return dict(zip(places, json.loads(asked.stdout), strict=True))

    ask.address = network["IPAddress"]
    return ask


def test_a_docker_worker_reaches_what_it_must_not_without_the_rules_and_only_the_rest_with_them(machine, reached):
    without = reached()
    assert set(without.values()) == {"reached"}, without
    machine.load()
    kept = {name: said for name, said in reached().items() if said != "reached"}
    assert set(kept) == set(without) - {"another host"}
    assert kept.pop("the host's address, translated")  # a refusal does not come through the translation
    assert set(kept.values()) == {"ConnectionRefusedError"}, kept  # at once, not after a timeout
    # who connects to a worker, such as to a sidecar beside it, is still answered
    assert machine.run(f"exec 3<>/dev/tcp/{reached.address}/7000").returncode == 0


def test_the_rules_can_be_loaded_again_and_leave_everybody_else_alone(machine):
    machine.load()
    once = machine.rules()
    machine.load()
    assert machine.rules() == once
    assert [line for line in once if line.startswith(("-A DOCKER-USER", "-A INPUT"))] == [
        "-A INPUT -j BLOCKYARD-DOCKER",
        "-A DOCKER-USER -j BLOCKYARD-DOCKER",
    ]
    assert machine.run(f"exec 3<>/dev/tcp/{HERE}/{API}", place=machine.there).returncode == 0


def test_the_unit_loads_and_removes_the_rules_with_one_capability_and_they_outlive_the_engine(machine):
    nobody = "setpriv --reuid=65534 --regid=65534 --clear-groups --no-new-privs --inh-caps=-all,+net_admin"
    nobody += " --ambient-caps=-all,+net_admin --bounding-set=-all,+net_admin bash -e -o pipefail -c "
    for command in (*_of_unit("ExecStart"), *_of_unit("ExecReload")):
        ours = command.replace("by admin firewall", f"by admin firewall --config {machine.config}")
        machine.run(nobody + shlex.quote(ours))
    loaded = machine.rules()
    assert "-A DOCKER-USER -j BLOCKYARD-DOCKER" in loaded
    machine.engine.end()
    machine.engine.start()
    assert machine.rules() == loaded
    (stop,) = _of_unit("ExecStop")
    machine.run(nobody.replace("-e -o", "-o") + shlex.quote(stop))
    assert machine.rules() == []
