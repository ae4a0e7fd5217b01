"""What a Docker worker is to try: this host as it looks from a container's network."""

from blockyard_api import settings
from blockyard_api.backends.spawner import Spawner
from blockyard_api.checks.context import Context
from blockyard_api.checks.network import container_targets


async def nobody():
    return False


def tried(listening=(), listeners=(), **environ):
    configured = settings.load("/nonexistent", {f"BLOCKYARD_{name}": value for name, value in environ.items()})
    helper = Spawner("/nonexistent", nobody)
    context = Context(configured, helper, helper, list, tuple(listening))
    return [str(target) for target in container_targets(context, listeners, "x")]


def test_what_listens_at_every_address_or_at_loopback_is_tried_at_the_gateway():
    found = tried([("0.0.0.0", 8080), ("127.0.0.1", 8081)], REDIS_URL="redis://localhost:6379")
    assert "the API (this host port 8080)" in found
    assert "the relay (this host port 8081)" in found
    assert "redis (this host port 6379)" in found


def test_what_is_elsewhere_is_tried_where_it_is():
    found = tried([("192.0.2.7", 8080)], REDIS_URL="redis://192.0.2.9:6379", VAULT_ADDRESS="https://vault.example")
    assert "the API (192.0.2.7 port 8080)" in found
    assert "redis (192.0.2.9 port 6379)" in found
    assert "vault (vault.example port 443)" in found


def test_what_listens_at_one_address_of_this_host_is_tried_and_what_the_world_reaches_is_no_secret():
    listeners = [
        ("127.0.0.1", 1),
        ("0.0.0.0", 22),
        ("172.17.0.1", 5432),
        ("192.0.2.7", 8080),
        ("::", 22),
        ("fe80::1", 9),
    ]
    found = [target for target in tried([("192.0.2.7", 8080)], listeners) if "listener" in target]
    assert found == ["a listener (172.17.0.1 port 5432)"]


def test_the_sockets_that_are_worth_most_are_tried_too():
    found = tried()
    assert "the container engine (/run/docker.sock)" in found
    assert "the Docker spawner (/run/blockyard/spawner-docker.sock)" in found
    assert "cloud metadata (169.254.169.254 port 80)" in found
