"""Root's configuration file: every mistake is one sentence that names file, key and remedy."""

import re

import pytest

from blockyard_spawner import config, protocol
from blockyard_spawner.config import KEYS, ConfigError, DataMount, Key

PARSERS = [
    (config.size, "512m", 512 << 20),
    (config.size, "2G", 2 << 30),
    (config.size, "1k", 1024),
    (config.cpu, 1.5, 1500),
    (config.cpu, 2, 2000),
    (config.cpu, "0.5", 500),
    (config.cpu, 0.05, 50),
    (config.cpu, "10", 10_000),
    (config.boolean, True, True),
    (config.boolean, "false", False),
    (config.boolean, "TRUE", True),
    (config.integer(1, 9), 5, 5),
    (config.integer(1, 9), "9", 9),
    (config.path, "/a/b/", "/a/b"),
    (config.path, "/", "/"),
    (config.path, "/a..b", "/a..b"),
    (config.choice("host", "none"), "none", "none"),
    (config.unless_none(config.size), "none", None),
    (config.unless_none(config.size), "1m", 1 << 20),
    (config.string_map, {"TZ": "UTC"}, {"TZ": "UTC"}),
    (config.data_mounts, [{"name": "a", "path": "/x"}], {"a": DataMount("a", "/x", writable=False)}),
    (config.data_mounts, [{"name": "a", "path": "/x", "mode": "rw"}], {"a": DataMount("a", "/x", writable=True)}),
]
WRONG = [
    *[(config.size, value) for value in (512, "512", "-1m", "0m", "1.5m", "m", "1mm", "1m\n", True, None, "")],
    *[(config.cpu, value) for value in (0, "0.0", 0.049, "00.04", -1, "1e3", float("inf"), True, "", "1.0000")],
    *[(config.boolean, value) for value in (1, 0, "yes", "", None)],
    *[(config.integer(1, 9), value) for value in (0, 10, "10", 1.0, True, "1 ", "", "-1", None)],
    *[(config.path, value) for value in ("relative", "", "/a/../b", "/..", "/a/..", "/a\n/../b", "/a\0b", 1, None)],
    *[(config.choice("host", "none"), value) for value in ("bridge", "", "hos", "host\n", 1)],
    *[(config.string_map, value) for value in ("x", {"a-b": "x"}, {"A": 1}, {"A": "\0"}, [])],
    *[(config.data_mounts, value) for value in ("x", {}, [1], [{}], [{"name": "a"}], [{"name": "a", "path": "x"}])],
    (config.data_mounts, [{"name": "a/b", "path": "/x"}]),
    (config.data_mounts, [{"name": "a", "path": "/x", "mode": "rx"}]),
    (config.data_mounts, [{"name": "a", "path": "/x", "other": 1}]),
]


@pytest.mark.parametrize(("parse", "value", "expected"), PARSERS)
def test_a_right_value_is_read(parse, value, expected):
    parsed = parse(value)
    assert (parsed, type(parsed)) == (expected, type(expected))


@pytest.mark.parametrize(("parse", "value"), WRONG)
def test_a_wrong_value_is_refused_with_what_to_write(parse, value):
    with pytest.raises(ValueError, match=r"\w"):
        parse(value)


@pytest.fixture
def file(tmp_path):
    def write(text):
        (tmp_path / "blockyard.toml").write_text(text)
        return str(tmp_path / "blockyard.toml")

    return write


def test_a_missing_file_means_defaults(tmp_path):
    loaded = config.load(str(tmp_path / "missing"), {}, KEYS)
    assert loaded == {name: key.default for name, key in KEYS.items()}


def test_the_environment_overrides_the_file(file):
    path = file('[process]\nr_path = "/opt/R/bin/R"\nnetwork = "none"\n')
    loaded = config.load(path, {"BLOCKYARD_PROCESS_NETWORK": "host"}, KEYS)
    assert (loaded["process.r_path"], loaded["process.network"]) == ("/opt/R/bin/R", "host")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[process]\nnetwork = 'bridge'", ["process.network", '"host" or "none"', "bridge"]),
        ("[server]\ndefault_memory_limit = 512", ["server.default_memory_limit", '"512m"']),
        ("network = 'none'", ["network", "section"]),
        ("[process", ["correct the file"]),
    ],
)
def test_a_mistake_is_one_sentence_with_file_key_and_remedy(file, text, words):
    path = file(text)
    with pytest.raises(ConfigError) as error:
        config.load(path, {}, KEYS)
    assert str(error.value).startswith(path)
    assert str(error.value).count("\n") == 0
    assert [word for word in words if word not in str(error.value)] == []


def test_a_mistake_in_the_environment_names_the_variable():
    with pytest.raises(ConfigError, match=r"BLOCKYARD_PROCESS_NETWORK: 'process\.network' must be"):
        config.load("/nonexistent", {"BLOCKYARD_PROCESS_NETWORK": "x"}, KEYS)


def test_the_spawner_ignores_keys_that_are_the_apis(file):
    path = file(
        "[proxy]\nmax_workers = 5\n[docker]\nspawner_socket = '/x'\n"
        "[process]\nnetwork = 'none'\nspawner_socket = '/x'\nskip_metadata_check = true"
    )
    others = {"BLOCKYARD_PROXY_MAX_WORKERS": "5", "BLOCKYARD_TOKEN": "x", "blockyard_process_x": "x"}
    assert config.load(path, others, KEYS)["process.network"] == "none"


@pytest.mark.parametrize("key", ["memroy_ceiling = '1g'", "netwrok = 'none'", "Network = 'none'", "network2 = 'none'"])
def test_a_misspelled_key_of_process_is_one_sentence_with_file_key_and_remedy(file, key):
    path = file(f"[process]\n{key}")
    name = key.partition(" ")[0]
    with pytest.raises(ConfigError) as error:
        config.load(path, {}, KEYS)
    assert str(error.value) == f"{path}: unknown key 'process.{name}'; correct its spelling or remove it."


def test_a_misspelled_variable_of_process_is_named():
    with pytest.raises(ConfigError, match=r"BLOCKYARD_PROCESS_NETWROK: unknown key 'process\.netwrok'"):
        config.load("/nonexistent", {"BLOCKYARD_PROCESS_NETWROK": "none"}, KEYS)


def test_a_key_may_be_added_by_the_api(file):
    keys = {**KEYS, "proxy.max_workers": Key(config.integer(1, 10), 3)}
    assert config.load(file("[proxy]\nmax_workers = 5"), {}, keys)["proxy.max_workers"] == 5


def test_the_least_cpu_is_the_same_in_the_configuration_and_on_the_wire():
    assert config.cpu(protocol.LEAST_CPU / 1000) == protocol.LEAST_CPU
    with pytest.raises(ValueError, match=re.escape(f"at least {protocol.LEAST_CPU / 1000}")):
        config.cpu((protocol.LEAST_CPU - 1) / 1000)
