"""What the firewall's rules are computed from: configuration, resolv.conf, and this machine's addresses."""

import socket
from ipaddress import ip_address

import pytest

from blockyard_api import settings
from blockyard_api.hardening import surroundings
from blockyard_spawner.config import ConfigError


def configured(**environ):
    return settings.load("/nonexistent", environ)


@pytest.mark.parametrize(
    ("variable", "url", "expected"),
    [
        ("REDIS_URL", "redis://127.0.0.1:6380/0", [("redis.url", "127.0.0.1", 6380)]),
        ("REDIS_URL", "rediss://user:p%40ss@redis.internal/1", [("redis.url", "redis.internal", 6379)]),
        ("REDIS_URL", "unix:///run/redis/redis.sock", []),
        ("VAULT_ADDRESS", "https://vault.internal", [("vault.address", "vault.internal", 443)]),
        ("VAULT_ADDRESS", "http://[2001:db8::1]:8200/v1", [("vault.address", "2001:db8::1", 8200)]),
        ("DATABASE_URL", "postgresql://u:p@db/blockyard", [("database.url", "db", 5432)]),
        ("DATABASE_URL", "postgresql:///blockyard?host=/run/postgresql", []),
    ],
)
def test_a_configured_service_is_a_host_and_a_port(variable, url, expected):
    assert surroundings.named_services(configured(**{f"BLOCKYARD_{variable}": url})) == expected


@pytest.mark.parametrize(
    "url",
    [
        "redis://:secret@1.2.3.4; flush ruleset",
        "redis://:secret@host:99999",
        "redis://:secret@host:0",
        'redis://:secret@ho"st',
        "redis://:secret@",
        "secret@host",
        "gopher://secret@host",
    ],
)
def test_a_service_that_names_no_host_is_refused_and_its_secret_not_repeated(url):
    with pytest.raises(ConfigError, match=r"'redis\.url' must be such as") as refused:
        configured(BLOCKYARD_REDIS_URL=url)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nameserver 127.0.0.53\noptions edns0\n", ["127.0.0.53"]),
        ("nameserver 192.0.2.1\n nameserver\t2001:db8::1 # the second\n", ["192.0.2.1", "2001:db8::1"]),
        ("nameserver fe80::1%eth0\n", ["fe80::1"]),
        ("nameserver 1.2.3.4; flush ruleset\n", ["1.2.3.4"]),
        ("nameserver 1.2.3\n#nameserver 9.9.9.9\n", ["127.0.0.1"]),
        ("", ["127.0.0.1"]),
    ],
)
def test_the_resolvers_are_those_that_the_c_library_asks(tmp_path, text, expected):
    file = tmp_path / "resolv.conf"
    file.write_text(text)
    assert surroundings.nameservers(file) == tuple(map(ip_address, expected))


def test_without_a_file_the_resolver_is_this_machine(tmp_path):
    assert surroundings.nameservers(tmp_path / "none") == (ip_address("127.0.0.1"),)


@pytest.mark.parametrize(
    ("text", "behind", "expected"),
    [
        ("nameserver 127.0.0.53\n", "nameserver 192.0.2.1\n", ["192.0.2.1"]),
        ("nameserver 127.0.0.1\nnameserver 192.0.2.2\n", "nameserver 192.0.2.1\n", ["192.0.2.2"]),
        ("nameserver 127.0.0.1\n", None, []),
    ],
)
def test_the_resolvers_of_containers_are_those_that_are_not_at_loopback(tmp_path, text, behind, expected):
    file, stub = tmp_path / "resolv.conf", tmp_path / "behind"
    file.write_text(text)
    if behind:
        stub.write_text(behind)
    assert surroundings.containers_resolvers(file, stub) == tuple(map(ip_address, expected))


def test_this_machines_addresses_are_listed_with_their_interface():
    found = surroundings.host_addresses()
    assert (ip_address("127.0.0.1"), "lo") in [(one.address, one.interface) for one in found]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as chosen:
        chosen.connect(("127.0.0.1", 9))
        assert ip_address(chosen.getsockname()[0]) in [one.address for one in found]


def test_what_is_looked_at_is_what_is_configured():
    around = surroundings.look(
        configured(
            BLOCKYARD_PROCESS_WORKER_UID_RANGE_START="70000",
            BLOCKYARD_PROCESS_WORKER_UID_RANGE_END="70099",
            BLOCKYARD_SERVER_BIND="127.0.0.1:9000",
            BLOCKYARD_REDIS_URL="redis://localhost",
            BLOCKYARD_VAULT_ADDRESS="https://vault.invalid",
        )
    )
    assert around.uids == (70000, 70099)
    assert around.cgroup.startswith("/")
    assert ip_address("127.0.0.1") in around.services[0].addresses
    assert around.services[1].addresses == ()  # no name, no stop
    assert around.listeners
    assert str(around.pool) == "10.213.0.0/16"
