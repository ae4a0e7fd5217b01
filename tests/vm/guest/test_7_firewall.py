"""The firewall, in each of its forms, loaded for real: what workers reach with it and without."""

import contextlib
import re
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from conftest import CHECKOUT
from machine import WORKERS, answers, as_user, checks, run, systemctl, unit
from running_pair import simple_app, wait_for

sys.path.insert(0, str(CHECKOUT))

from blockyard_api.hardening.firewall import CGROUP_RECORD, forgotten_cgroup

pytestmark = pytest.mark.timeout(600)

CONFIGURATION = Path("/etc/blockyard/blockyard.toml")
RESOLVER = Path("/etc/resolv.conf")
HERE, OUTSIDE = "198.51.100.1", "198.51.100.2"  # the two ends of a veth pair
HERE_6, OUTSIDE_6 = "2001:db8:5::1", "2001:db8:5::2"
LATER = "198.51.100.77"  # an address that the machine gets after the rules are loaded

# What a worker tries: what it is called, the protocol, where.
PROTECTED = {
    "metadata": ("tcp", "169.254.169.254", 80),
    "metadata of IPv6": ("tcp", "fd00:ec2::254", 80),
    "redis": ("tcp", "127.0.0.1", 6399),
    "another worker": ("tcp", "127.0.0.1", 7001),
    "another worker by the host's address": ("tcp", HERE, 7001),
    "the API": ("tcp", "127.0.0.1", 8080),
    "the relay": ("tcp", "127.0.0.1", 8081),
    "the host's address": ("tcp", HERE, 7002),
    "the host's address of IPv6": ("tcp", HERE_6, 7002),
    "loopback of IPv6": ("tcp", "::1", 7002),
    "loopback, written as IPv6": ("tcp", "::ffff:127.0.0.1", 7002),
    "all zeroes": ("tcp", "0.0.0.0", 7002),
    "datagrams by loopback": ("udp", "127.0.0.1", 7004),
    "datagrams by broadcast": ("udp", "198.51.100.255", 7004),
    "vault, outside": ("tcp", OUTSIDE, 8200),
    "an address of later": ("tcp", LATER, 7002),
    "a published port": ("tcp", HERE, 7003),
    "the resolver's other ports": ("tcp", "127.0.0.53", 7002),
}
ALLOWED = {
    "the resolver": ("udp", "127.0.0.53", 53),
    "the resolver by TCP": ("tcp", "127.0.0.53", 53),
    "outside": ("tcp", OUTSIDE, 80),
    "outside by IPv6": ("tcp", OUTSIDE_6, 80),
    "datagrams outside": ("udp", OUTSIDE, 7004),
}
EVERYTHING = PROTECTED | ALLOWED
ANOTHER = {name for name, (_, _, port) in PROTECTED.items() if port == 7001}
# What systemd's filter cannot tell apart: it sees addresses, those that were there, and after their translation.
# All of OUTSIDE's IPv4 goes with vault's port.
BEYOND_SYSTEMD = {"an address of later", "the resolver's other ports"}
LOST_WITH_VAULT = {"outside", "datagrams outside"}

REACH = f"""
import concurrent.futures, errno, socket
def reach(protocol, host, port):
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    tried = socket.socket(family, socket.SOCK_DGRAM if protocol == "udp" else socket.SOCK_STREAM)
    tried.settimeout(8)
    if protocol == "udp":
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
    try:
        if protocol == "udp":
            tried.sendto(b"anybody there?", (host, port))
            tried.recvfrom(100)
        else:
            tried.connect((host, port))
    except TimeoutError:
        return "silent"
    except OSError as error:
        return errno.errorcode[error.errno]
    return "open"
targets = {EVERYTHING!r}
with concurrent.futures.ThreadPoolExecutor(len(targets)) as pool:
    for name, how in zip(targets, pool.map(lambda target: reach(*target), targets.values())):
        print(name, how, sep="=")
"""
UI = """function(req) {
  met <- system2("python3", c("-I", "reach.py"), stdout = TRUE)
  fluidPage(paste0(c("SEEN", met, ""), collapse = "|"))
}"""
LISTEN = """
import selectors, socket, sys
chosen = selectors.DefaultSelector()
for word in sys.argv[1:]:
    protocol, host, port = word.split(",")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_DGRAM if protocol == "udp" else socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    sock.bind((host, int(port)))
    if protocol == "tcp":
        sock.listen(64)
    chosen.register(sock, selectors.EVENT_READ, protocol)
print("listening", flush=True)
while True:
    for key, _ in chosen.select():
        if key.data == "tcp":
            key.fileobj.accept()[0].close()
        else:
            key.fileobj.sendto(b"yes", key.fileobj.recvfrom(100)[1])
"""
NETWORK = f"""
ip link add meta0 type dummy
ip link set meta0 up
ip address add 169.254.169.254/32 dev meta0
ip address add fd00:ec2::254/128 dev meta0 nodad
ip netns add outside
ip link add inside0 type veth peer name outside0 netns outside
ip address add {HERE}/24 broadcast + dev inside0
ip address add {HERE_6}/64 dev inside0 nodad
ip link set inside0 up
ip -n outside address add {OUTSIDE}/24 dev outside0
ip -n outside address add {OUTSIDE_6}/64 dev outside0 nodad
ip -n outside link set outside0 up
nft add table ip published
nft 'add chain ip published output {{ type nat hook output priority -100; }}'
nft add rule ip published output ip daddr {HERE} tcp dport 7003 dnat to {OUTSIDE}:80
"""


def documented(form):
    """Give the commands that docs/firewall.md names for a form: the one that loads it, and those that remove it."""
    text = (CHECKOUT / "docs" / "firewall.md").read_text()
    section = re.search(rf"^### {form}\n(.*?)(?=^### |\Z)", text, re.MULTILINE | re.DOTALL)[1]
    load, *remove = [line.strip().replace("sudo ", "") for line in re.findall("^    (.*)", section, re.MULTILINE)]
    return load, remove


def listener(*places, inside=()):
    process = subprocess.Popen([*inside, sys.executable, "-c", LISTEN, *places], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "listening\n"
    return process


@pytest.fixture(scope="module")
def surroundings(server):
    """A metadata service, Redis, a machine outside, a published port, a resolver: all of it real."""
    run("sh", "-e", "-c", NETWORK)
    kept = {path: path.read_text() for path in (CONFIGURATION, RESOLVER)}
    CONFIGURATION.write_text(
        kept[CONFIGURATION]
        .replace("[redis]\n", '[redis]\nurl = "redis://127.0.0.1:6399"\n')
        .replace("[vault]\n", f'[vault]\naddress = "http://{OUTSIDE}:8200"\n')
    )
    RESOLVER.write_text("nameserver 127.0.0.53\n")
    redis = subprocess.Popen(["redis-server", "--port", "6399", "--bind", "127.0.0.1", "--save", ""])
    started = [
        redis,
        listener("tcp,169.254.169.254,80", "tcp,fd00:ec2::254,80", "tcp,0.0.0.0,7002", "tcp,::,7002",
                 "udp,0.0.0.0,7004", "udp,127.0.0.53,53", "tcp,127.0.0.53,53"),
        listener(f"tcp,{OUTSIDE},80", f"tcp,{OUTSIDE},8200", f"tcp,{OUTSIDE_6},80", f"udp,{OUTSIDE},7004",
                 inside=["ip", "netns", "exec", "outside"]),
    ]  # fmt: skip
    yield
    for process in started:
        process.kill()
        process.wait()
    for command in (
        "ip link del meta0",
        "ip link del inside0",
        "ip netns del outside",
        "nft delete table ip published",
    ):
        run(*command.split())
    for path, text in kept.items():
        path.write_text(text)


class Curious:
    """An app that tells what it reaches, and another whose port is one of the things it tries."""

    def __init__(self, server):
        self.server = server
        listening = 'system2("python3", c("-I", "listen.py", "tcp,0.0.0.0,7001"), wait = FALSE)'
        server.deploy("listening", {**simple_app(listening), "listen.py": LISTEN})
        server.deploy("reaching", {**simple_app(ui=UI), "reach.py": REACH})
        self.neighbour, self.visitor = server.visitor(), server.visitor()  # the same ones, so the same two workers

    def page(self, visitor, app):
        """Show the app to a visitor who has patience: a busy machine that emulates takes its time to start R."""

        def shown():
            with contextlib.suppress(httpx.TransportError):
                answer = visitor.get(f"/app/{app}/")
                return answer if answer.status_code == 200 else None

        return wait_for(shown, 240, f"a page of {app}").text

    def reaches(self, *, beside_another=True):
        """Name what the app reaches, and tell of each thing what it met with."""
        answers(self.server)
        if beside_another:
            self.page(self.neighbour, "listening")  # it ends when nobody visits it
        run("ip", "address", "replace", f"{LATER}/24", "dev", "inside0")
        try:
            page = self.page(self.visitor, "reaching")
        finally:
            run("ip", "address", "del", f"{LATER}/24", "dev", "inside0")
        met = dict(word.split("=") for word in re.search(r"SEEN\|([^<]*)\|", page)[1].split("|"))
        assert met.keys() == EVERYTHING.keys()
        return {name for name, how in met.items() if how == "open"}, met

    def is_kept_in(self):
        """Tell whether the rules hold, without the time that the start of another worker takes."""
        reached, met = self.reaches(beside_another=False)
        reached -= ANOTHER
        assert reached in (set(ALLOWED), set(EVERYTHING) - ANOTHER), met
        return reached == set(ALLOWED)


@pytest.fixture(scope="module")
def curious(server, surroundings):
    yield (app := Curious(server))
    for name in ("listening", "reaching"):
        app.server.http.delete(f"/api/v1/apps/{name}")


@pytest.fixture
def loaded(request):
    """A function that loads a form's rules as documented, and what was loaded is taken away in the end."""
    done = []

    def load(form):
        command, remove = documented(form)
        done[:] = [remove]
        run("bash", "-e", "-o", "pipefail", "-c", command, timeout=200)

    yield load
    for remove in done:
        for command in remove:
            run("sh", "-c", command)


def rules_in_force():
    """Give all rules of all tools, without their counters."""
    tools = (("nft", "list", "ruleset"), ("iptables", "-S"), ("ip6tables", "-S"))
    return re.sub(r"counter packets \d+ bytes \d+", "counter", "".join(run(*tool).stdout for tool in tools))


def assert_everybody_else_is_free():
    """The API's user and root reach all they need, and visitors the API."""
    tries = [("tcp", "127.0.0.1", 6399), ("tcp", "169.254.169.254", 80), ("tcp", OUTSIDE, 8200), ("tcp", HERE, 7002)]
    connect = f"import socket; [socket.create_connection(to, 5) for _, *to in {tries!r}]"
    for user in ("root", "blockyard"):
        assert as_user(user, "python3", "-c", connect).returncode == 0, user
        for port, path in ((8080, "healthz"), (8081, "healthz")):
            asked = as_user(user, "curl", "--silent", "--output", "/dev/null", f"http://127.0.0.1:{port}/{path}")
            assert asked.returncode == 0, (user, port)


def test_without_rules_a_worker_reaches_everything(curious):
    reached, met = curious.reaches()
    assert reached == set(EVERYTHING), met


def assert_kept_in(curious, loaded, form):
    loaded(form)
    once = rules_in_force()
    if form.endswith("-cgroup"):  # which loads them again with the workers' unit
        systemctl("start", f"blockyard-firewall-cgroup@{form.removesuffix('-cgroup')}")
    else:
        run("sh", "-c", f"by admin firewall --format {form} --apply-with | sh -e")
    assert rules_in_force() == once  # nothing piles up
    reached, met = curious.reaches()
    assert reached == set(ALLOWED), met
    refused = {met[name] for name, (protocol, *_) in PROTECTED.items() if protocol == "tcp"}
    assert refused == {"ECONNREFUSED"}, met  # at once, not after a timeout
    assert_everybody_else_is_free()


@pytest.mark.parametrize("form", ["nft", "nft-cgroup"])
def test_in_the_forms_of_nft_a_worker_reaches_the_world_and_nothing_of_this_machine(curious, loaded, form):
    assert_kept_in(curious, loaded, form)


@pytest.mark.parametrize("form", ["iptables-owner", "iptables-cgroup"])
def test_in_the_forms_of_iptables_a_worker_reaches_the_world_and_nothing_of_this_machine(curious, loaded, form):
    assert_kept_in(curious, loaded, form)


def test_rules_that_were_removed_hold_nobody(curious):
    reached, met = curious.reaches()
    assert reached == set(EVERYTHING), met


def test_systemds_filter_keeps_workers_from_addresses(curious, loaded):
    workers = unit("blockyard-workers.service", "InvocationID")
    loaded("systemd")
    reached, met = curious.reaches()
    assert reached == (set(ALLOWED) - LOST_WITH_VAULT) | BEYOND_SYSTEMD, met
    assert unit("blockyard-workers.service", "InvocationID") == workers  # nobody's session ended for it
    assert_everybody_else_is_free()


def test_systemds_filter_that_was_removed_holds_nobody(curious):
    assert not curious.is_kept_in()


def test_the_firewalls_units_are_locked_down(server, show):
    for name in ("blockyard-firewall.service", "blockyard-firewall-cgroup@nft.service"):
        told = run("systemd-analyze", "security", "--no-pager", name, check=False).stdout
        line = told.strip().splitlines()[-1]
        show(line.strip("→ "))
        assert float(re.search(r"service: ([\d.]+)", line)[1]) <= 2.0
        assert unit(name, "CapabilityBoundingSet") == "cap_net_admin"
        assert unit(name, "DynamicUser") == "yes"


def test_the_firewalls_unit_keeps_workers_in_as_long_as_there_are_any(curious, show):
    began = time.monotonic()
    systemctl("enable", "--now", "blockyard-firewall")
    show(f"the firewall's unit started in {time.monotonic() - began:.1f} s")
    before = rules_in_force()
    systemctl("reload", "blockyard-firewall")
    assert rules_in_force() == before
    systemctl("stop", "blockyard.target")  # workers outlive it
    assert rules_in_force() == before
    systemctl("start", "blockyard.target")
    systemctl("stop", "blockyard-workers")
    wait_for(lambda: "table inet blockyard" not in rules_in_force(), 60, "the rules' end, after the last worker's")
    systemctl("start", "blockyard-workers")  # which waits for the rules
    assert rules_in_force() == before
    assert curious.is_kept_in()
    assert_everybody_else_is_free()
    systemctl("disable", "--now", "blockyard-firewall")
    assert unit("blockyard-workers.service", "ActiveState") == "active"
    assert not curious.is_kept_in()


def test_rules_that_cannot_be_made_leave_the_former_in_force_and_keep_workers_from_starting_if_wanted(curious):
    strict = Path("/run/systemd/system/blockyard-workers.service.d/strict.conf")
    strict.parent.mkdir(parents=True)
    strict.write_text("[Unit]\nRequires=blockyard-firewall.service\n")
    systemctl("daemon-reload")
    right = CONFIGURATION.read_text()
    systemctl("enable", "--now", "blockyard-firewall")
    before = rules_in_force()
    assert "table inet blockyard" in before
    try:
        CONFIGURATION.write_text(right.replace('url = "redis://127', 'url = "redis://not a host 127'))
        assert systemctl("reload", "blockyard-firewall", check=False).returncode != 0
        assert rules_in_force() == before
        systemctl("stop", "blockyard-workers")
        assert systemctl("start", "blockyard-workers", check=False).returncode != 0
        said = run("journalctl", "--unit=blockyard-firewall", "--quiet").stdout
        assert "'redis.url' must be such as redis://host" in said
    finally:
        CONFIGURATION.write_text(right)
        strict.unlink()
        strict.parent.rmdir()
        systemctl("daemon-reload")
        systemctl("start", "blockyard-workers")
        systemctl("disable", "--now", "blockyard-firewall")


def firewall_check(server):
    """What the start-up check says of rules by cgroup now."""
    return checks(server)["firewall"]


def forgotten():
    """What the record of the rules by cgroup says that is not so any more, or None."""
    return forgotten_cgroup(Path(CGROUP_RECORD).read_text(), WORKERS.stat().st_ino)


def await_reloaded(instance):
    """Wait until the rules by cgroup are those of the workers' unit as it runs now."""
    wait_for(lambda: forgotten() is None and unit(instance, "ActiveState") == "inactive", 200, "the rules")


def test_nft_rules_by_cgroup_are_loaded_again_with_the_workers_unit_and_missed_without(server, curious, loaded):
    instance = "blockyard-firewall-cgroup@nft"
    loaded("nft-cgroup")
    systemctl("restart", "blockyard-workers")
    await_reloaded(instance)
    assert curious.is_kept_in()
    systemctl("disable", instance)
    systemctl("restart", "blockyard-workers")
    remedy = re.search(r"run (.*)\.$", forgotten())[1]
    assert not curious.is_kept_in()  # what the check is for
    assert firewall_check(server)["severity"] == "error"
    run(*remedy.split(), timeout=200)
    assert forgotten() is None
    assert firewall_check(server)["severity"] == "ok"
    assert curious.is_kept_in()
