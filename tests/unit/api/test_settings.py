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
        ("bind = 'x'\n", ["outside a section"]),
        ("[proxy]\nmax_workers = '-3'\n", ["'proxy.max_workers'", "whole number from 1"]),
        ("[proxy]\nmax_workers = true\n", ["'proxy.max_workers'", "whole number"]),
        ("[proxy]\nworker_start_timeout = '-3s'\n", ["'proxy.worker_start_timeout'", '"30s"']),
        ("[proxy]\nworker_start_timeout = '0s'\n", ["above zero"]),
        ("[server]\ndefault_memory_limit = '-512m'\n", ["'server.default_memory_limit'", '"512m"']),
        ("[server]\ndefault_memory_limit = 512\n", ['"512m"']),
        ("[server]\nbind = 'localhost'\n", ["address and port"]),
        ("[server]\nbind = '127.0.0.1:99999'\n", ["address and port"]),
        ("[server]\nbackend = 'docker'\n", ["'server.backend'", "process"]),
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


def test_a_wrong_variable_is_named(tmp_path):
    with pytest.raises(ConfigError, match="BLOCKYARD_PROXY_MAX_WORKERS"):
        load(tmp_path, BLOCKYARD_PROXY_MAX_WORKERS="many")
