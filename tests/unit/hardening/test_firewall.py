"""The firewall's rules as texts, and that nothing but parsed values gets into them."""

import re
import subprocess
from dataclasses import replace
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from blockyard_api.hardening.firewall import (
    Format,
    HostAddress,
    Listener,
    NotExpressible,
    Service,
    Surroundings,
    container_rules,
    forgotten_cgroup,
    loaded_by,
    render,
    rules,
)

GOLDEN = Path(__file__).parent / "golden"
AROUND = Surroundings(
    uids=(60000, 60999),
    cgroup="/system.slice/blockyard-workers.service",
    addresses=(
        HostAddress(ip_address("127.0.0.1"), "lo"),
        HostAddress(ip_address("192.0.2.7"), "eth0"),
        HostAddress(ip_address("2001:db8::7"), "eth0"),
        HostAddress(ip_address("fe80::7"), "eth0"),
    ),
    resolvers=(ip_address("127.0.0.53"),),
    listeners=(
        Listener("the API", ip_address("127.0.0.1"), 8080),
        Listener("the relay to the apps", ip_address("0.0.0.0"), 8081),
    ),
    services=(
        Service("redis.url", "redis.internal", 6379, (ip_address("10.0.0.9"), ip_address("2001:db8::9"))),
        Service("vault.address", "vault.internal", 8200, ()),
    ),
    translates=True,
    pool=ip_network("10.213.0.0/16"),
    container_resolvers=(ip_address("192.0.2.53"),),
)
HOSTILE = '1.2.3.4"; flush ruleset; #\nflush ruleset'


@pytest.mark.parametrize("form", Format)
def test_the_rules_read_like_this(form):
    assert render(AROUND, form) == (GOLDEN / f"firewall.{form}").read_text()


@pytest.mark.parametrize("form", Format)
def test_no_rule_is_for_everything(form):
    for network in ("0.0.0.0/0", "::/0", "Deny=any"):
        assert network not in render(AROUND, form)
    assert all(rule.destination.prefixlen >= 4 for rule in rules(AROUND))


@pytest.mark.parametrize("form", Format)
def test_a_service_without_an_address_is_named_and_hinders_nothing(form):
    text = render(AROUND, form)
    assert "# NOT KEPT FROM WORKERS: vault.address, vault.internal has no address now." in text
    assert "169.254.0.0/16" in text


@pytest.mark.parametrize("form", Format)
def test_a_hostile_name_never_gets_into_a_rule(form):
    hostile = replace(
        AROUND,
        addresses=(HostAddress(ip_address("192.0.2.7"), HOSTILE),),
        services=(
            Service("redis.url", HOSTILE, 6379, (ip_address("10.0.0.9"),)),
            Service("vault.address", HOSTILE, 8200, ()),
        ),
    )
    assert not {"ruleset", "1.2.3.4"} & set(re.findall(r"[\w.]+", render(hostile, form)))


@pytest.mark.parametrize("form", [Format.NFT_CGROUP, Format.IPTABLES_CGROUP])
@pytest.mark.parametrize("path", ['/x" accept', "/x\n", "", "/", "relative", "/x y", '/x"; flush ruleset'])
def test_a_cgroup_that_no_rule_can_name_is_refused(form, path):
    with pytest.raises(NotExpressible, match="matches by uid"):
        render(replace(AROUND, cgroup=path), form)


def test_the_zone_of_a_link_local_resolver_is_no_part_of_a_rule():
    found = rules(replace(AROUND, resolvers=(ip_address("fe80::1%eth0"),)))
    assert str(found[0].destination) == "fe80::1/128"


@pytest.mark.parametrize("resolver", ["127.0.0.1", "169.254.169.254", "192.0.2.7", "10.0.0.9"])
def test_systemds_filter_is_not_offered_where_it_would_open_a_protected_address(resolver):
    around = replace(AROUND, resolvers=(ip_address(resolver),))
    with pytest.raises(NotExpressible, match="use --format nft"):
        render(around, Format.SYSTEMD)
    assert f"ip daddr {resolver} meta l4proto {{ tcp, udp }} th dport 53 accept" in render(around, Format.NFT)


def test_a_resolver_elsewhere_needs_no_exception_from_systemds_filter():
    assert "IPAddressAllow" not in render(replace(AROUND, resolvers=(ip_address("192.0.2.1"),)), Format.SYSTEMD)


def test_connections_are_not_tracked_for_the_sake_of_the_rules():
    untracked = replace(AROUND, translates=False)
    assert "conntrack" not in render(untracked, Format.IPTABLES_OWNER)


@pytest.mark.parametrize("form", Format)
def test_the_commands_that_load_are_a_pipeline_each(form):
    commands = loaded_by(form, "by admin firewall")
    assert all(not command.startswith("sudo") for command in commands)
    assert commands[0].startswith(("by admin firewall | ", "rules=$(by admin firewall) && "))


def test_rules_that_cannot_be_printed_replace_none(tmp_path):
    for name in ("install", "systemctl"):
        (tmp_path / name).write_text(f"#!/bin/sh\ntouch {tmp_path}/touched\n")
        (tmp_path / name).chmod(0o755)
    for command in loaded_by(Format.SYSTEMD, "false"):
        done = subprocess.run(["/bin/sh", "-c", command], env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, check=False)
        assert done.returncode != 0
    assert not (tmp_path / "touched").exists()


def test_the_record_of_a_cgroup_tells_rules_that_match_nobody():
    assert forgotten_cgroup(None, 4711) is None  # never loaded
    assert forgotten_cgroup("nft 4711\n", 4711) is None
    assert forgotten_cgroup("nft 4711\n", None) is None  # no workers
    assert "restart blockyard-firewall-cgroup@nft." in forgotten_cgroup("nft 4711\n", 4712)
    assert "restart blockyard-firewall-cgroup@iptables." in forgotten_cgroup("iptables 4711\n", 4712)
    assert "@nft" in forgotten_cgroup("", 4712)
    assert "@nft" in forgotten_cgroup("nft \n", 4712)


def test_what_docker_workers_must_not_reach_are_destinations_by_ipv4_that_leave_their_own_network():
    found = container_rules(AROUND)
    assert [rule.destination.version for rule in found] == [4] * len(found)
    assert not [rule for rule in found if rule.destination.is_loopback]
    refused = {(str(rule.destination), rule.port) for rule in found if not rule.allowed}
    assert {("169.254.0.0/16", None), ("10.0.0.9/32", 6379), ("192.0.2.7/32", None)} <= refused
    assert [(str(rule.destination), rule.port) for rule in found if rule.allowed] == [("192.0.2.53/32", 53)]


def test_the_networks_of_docker_workers_that_run_just_now_are_in_no_rule():
    bridge = HostAddress(ip_address("10.213.4.1"), "br-0123456789ab")
    assert render(replace(AROUND, addresses=(*AROUND.addresses, bridge)), Format.DOCKER) == render(
        AROUND, Format.DOCKER
    )


def test_rules_for_docker_are_for_its_pool_alone():
    around = replace(AROUND, pool=ip_network("10.99.0.0/20"))
    jumps = [line for line in render(around, Format.DOCKER).splitlines() if line.startswith("-A BLOCKYARD-DOCKER ")]
    assert len(jumps) == 2
    assert all(line.startswith("-A BLOCKYARD-DOCKER -s 10.99.0.0/20 ") for line in jumps)
