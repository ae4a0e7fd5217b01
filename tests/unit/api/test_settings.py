"""The configuration: defaults, the environment's precedence, and errors that name file, key and remedy."""

import pytest

from blockyard_api import settings
from blockyard_spawner.config import ConfigError


def load(tmp_path, text="", **environ):
    file = tmp_path / "blockyard.toml"
    file.write_text(text)
    return settings.load(str(file), environ)


def test_an_empty_file_gives_the_documented_defaults(tmp_path):
    loaded = load(tmp_path)
    assert loaded.server.bind == ("127.0.0.1", 8080)
    assert loaded.proxy.bind == ("127.0.0.1", 8081)
    assert loaded.proxy.worker_start_timeout == 60
    assert loaded.proxy.idle_worker_timeout == 300
    assert loaded.proxy.max_workers == 100
    assert loaded.proxy.ws_cache_ttl == 60
    assert loaded.storage.state_dir == "/var/lib/blockyard"
    assert loaded.storage.bundle_retention == 50
    assert loaded.storage.max_bundle_size == 100 << 20
    assert (loaded.process.worker_uid_range_start, loaded.process.worker_uid_range_end) == (60000, 60999)


def test_a_missing_file_means_defaults(tmp_path):
    assert settings.load(str(tmp_path / "none.toml"), {}).server.backend == "process"


def test_the_environment_overrides_the_file(tmp_path):
    loaded = load(tmp_path, '[proxy]\nmax_workers = 5\nidle_worker_timeout = "1m"\n', BLOCKYARD_PROXY_MAX_WORKERS="7")
    assert loaded.proxy.max_workers == 7
    assert loaded.proxy.idle_worker_timeout == 60


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[proxy]\nmax_worker = 5\n", ["'proxy.max_worker'", "did you mean 'proxy.max_workers'"]),
        ("[oidc]\nissuer = 'x'\n", ["'oidc.issuer'", "remove it"]),
        ("[rediss]\nurl = 'x'\n", ["'rediss.url'", "did you mean 'redis.url'"]),
        ("[redis]\nurl = 'x'\n", ["'redis.url'", "redis://host"]),
        ("[redis]\nurl = 'unix://host/path'\n", ["'redis.url'", "unix:///path"]),
        ("[redis]\nurl = 6379\n", ["'redis.url'", "a string"]),
        ("[vault]\naddress = 'vault:8200'\n", ["'vault.address'", "https://host"]),
        ("[database]\nurl = 'mysql://host/db'\n", ["'database.url'", "postgresql://host"]),
        ("bind = 'x'\n", ["outside a section"]),
        ("[proxy]\nmax_workers = '-3'\n", ["'proxy.max_workers'", "whole number from 1"]),
        ("[proxy]\nmax_workers = true\n", ["'proxy.max_workers'", "whole number"]),
        ("[proxy]\nworker_start_timeout = '-3s'\n", ["'proxy.worker_start_timeout'", '"30s"']),
        ("[proxy]\nworker_start_timeout = '0s'\n", ["above zero"]),
        ("[server]\npreflight_timeout = '41s'\n", ["'server.preflight_timeout'", "40s at most"]),
        ("[server]\ndefault_memory_limit = '-512m'\n", ["'server.default_memory_limit'", '"512m"']),
        ("[server]\ndefault_memory_limit = 512\n", ['"512m"']),
        ("[server]\nbind = 'localhost'\n", ["address and port"]),
        ("[server]\nbind = '127.0.0.1:99999'\n", ["address and port"]),
        ("[server]\nbackend = 'podman'\n", ["'server.backend'", "process"]),
        ("[storage]\nstate_dir = 'var'\n", ["absolute path"]),
        ("[storage]\nstate_dir = '/var/../etc'\n", ["absolute path"]),
        ("[proxy]\npublic_url = 'https://apps.example.com/'\n", ["{app}"]),
        ("[proxy]\npublic_url = 'https://x{app}.example.com/'\n", ["{app}"]),
        ("[server]\ntrusted_proxies = ['10.0.0.300']\n", ["10.0.0.300"]),
        ("[proxy\n", ["correct the file"]),
    ],
)
def test_a_wrong_value_is_one_sentence_that_names_the_file_and_what_to_write(tmp_path, text, words):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    sentence = str(caught.value)
    assert str(tmp_path / "blockyard.toml") in sentence
    assert all(word in sentence for word in words), sentence
    assert "\n" not in sentence.strip()


@pytest.mark.parametrize(
    ("variable", "remedy"),
    [
        ("BLOCKYARD_PROCESS_NETWROK", "did you mean 'BLOCKYARD_PROCESS_NETWORK'"),
        ("BLOCKYARD_VAULT_QJZQJZQJZQJZQJZQJZQJZQJZ", "remove it"),
    ],
)
def test_a_variable_that_is_no_key_is_not_ignored(tmp_path, variable, remedy):
    with pytest.raises(ConfigError, match=f"unknown variable '{variable}'; {remedy}"):
        load(tmp_path, **{variable: "none"})


def test_a_variable_of_the_command_line_is_none_of_ours(tmp_path):
    load(tmp_path, BLOCKYARD_URL="http://127.0.0.1:8080", BLOCKYARD_TOKEN="by_x")


def test_a_wrong_variable_is_named(tmp_path):
    with pytest.raises(ConfigError, match="BLOCKYARD_PROXY_MAX_WORKERS"):
        load(tmp_path, BLOCKYARD_PROXY_MAX_WORKERS="many")


@pytest.mark.parametrize(
    ("key", "address", "where"),
    [
        ("redis.url", "redis://:s3cret@10.0.0.5", ("10.0.0.5", 6379, "")),
        ("redis.url", "rediss://user:s3cret@redis.example.com:6380/1", ("redis.example.com", 6380, "")),
        ("redis.url", "unix:///run/redis/redis.sock", ("", 0, "/run/redis/redis.sock")),
        ("redis.url", "redis://[::1]:7000", ("::1", 7000, "")),
        ("vault.address", "https://vault.example.com:8200", ("vault.example.com", 8200, "")),
        ("vault.address", "http://vault/", ("vault", 80, "")),
        ("database.url", "postgresql://u:s3cret@db/name", ("db", 5432, "")),
        ("database.url", "postgres:///name?host=/run/pg&port=5432", ("", 0, "/run/pg/.s.PGSQL.5432")),
        ("database.url", "postgresql:///name", ("", 0, "/var/run/postgresql/.s.PGSQL.5432")),
    ],
)
def test_a_services_address_says_where_it_listens(key, address, where):
    found = settings.endpoint(key, address)
    assert (found.host, found.port, found.path) == where


@pytest.mark.parametrize("key", ["redis.url", "database.url"])
@pytest.mark.parametrize("address", ["redis:/:s3cret@host", "http://:s3cret@host", "redis://host:s3cret", "s3cret"])
def test_a_wrong_address_with_a_password_is_not_repeated(tmp_path, key, address):
    section, _, name = key.partition(".")
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, f'[{section}]\n{name} = "{address}"\n')
    assert key in str(caught.value)
    assert "s3cret" not in str(caught.value)
    assert caught.value.__cause__ is None
    with pytest.raises(ConfigError, match=f"BLOCKYARD_{section.upper()}_{name.upper()}"):
        load(tmp_path, **{f"BLOCKYARD_{section.upper()}_{name.upper()}": address})


def test_the_settings_as_text_hold_no_password(tmp_path):
    text = '[redis]\nurl = "redis://:s3cret@host"\n[database]\nurl = "postgres://u:s3cret@host/x"\n'
    loaded = load(tmp_path, text)
    assert loaded.redis.url == "redis://:s3cret@host"
    assert "s3cret" not in repr(loaded)


def test_a_services_address_that_is_empty_is_none(tmp_path):
    assert load(tmp_path, '[redis]\nurl = ""\n').redis.endpoint is None
