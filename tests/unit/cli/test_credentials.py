"""Which server a command talks to, as whom, and how a login is kept."""

import json
import stat
from pathlib import Path

import pytest

from blockyard_api.cli.client import Failure, UsedWrongly
from blockyard_api.cli.credentials import Credentials, forget, load, resolve, save

HERE = "http://127.0.0.1:8080"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_a_login_is_kept_for_its_owner_alone(home: Path) -> None:
    path = save(Credentials(HERE, "by_secret"))
    assert path == home / ".config/by/config.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert load() == Credentials(HERE, "by_secret")


def test_a_new_login_replaces_the_old_one_whole_and_tightens_its_mode(home: Path) -> None:
    path = save(Credentials(HERE, "by_first"))
    path.chmod(0o644)
    save(Credentials(HERE, "by_second"))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["config.json"]
    assert load() == Credentials(HERE, "by_second")


def test_a_login_is_forgotten_once(home: Path) -> None:
    save(Credentials(HERE, "by_secret"))
    assert forget() is True
    assert forget() is False
    assert load() is None


def test_options_come_before_the_environment_and_that_before_the_login() -> None:
    save(Credentials("http://stored:1", "by_stored"))
    environ = {"BLOCKYARD_URL": "http://environment:2/", "BLOCKYARD_TOKEN": "by_environment"}
    assert resolve("https://option", "by_option", environ) == Credentials("https://option", "by_option")
    assert resolve(None, None, environ) == Credentials("http://environment:2", "by_environment")
    assert resolve(None, None, {}) == Credentials("http://stored:1", "by_stored")


def test_without_any_login_the_local_server_is_asked_as_nobody() -> None:
    assert resolve(None, None, {}) == Credentials(HERE, None)


@pytest.mark.parametrize("server", ["http://other:1", "https://stored:1", "http://stored:1/prefix"])
def test_a_kept_token_is_never_sent_to_another_server(server: str) -> None:
    save(Credentials("http://stored:1", "by_stored"))
    assert resolve(server, None, {}).token is None
    assert resolve(None, None, {"BLOCKYARD_URL": server}).token is None


NO_ADDRESSES = [
    "localhost:8080", "ftp://x", "http://", "http://user:word@host", "http://host:99999", "http://[", "//x", "",
    f"http://{'a' * 64}.org", f"http://{'ü' * 63}.org", "http://a..b", "http://\udcff", "http://x/\udcff",
]  # fmt: skip


@pytest.mark.parametrize("server", NO_ADDRESSES)
def test_what_is_no_address_is_said_so(server: str) -> None:
    with pytest.raises(UsedWrongly, match="is no server's address"):
        resolve(server or "/", None, {})


@pytest.mark.parametrize("server", ["http://[::1]:8080", f"http://{'a' * 63}.org.", "http://faß.org", "http://a_b"])
def test_what_is_an_unusual_address_is_taken(server: str) -> None:
    assert resolve(server, None, {}).server == server


@pytest.mark.parametrize("token", ["two words", "line\nbreak", "ü"])
def test_what_is_no_token_is_not_sent(token: str) -> None:
    with pytest.raises(Failure, match="A token is one word") as refused:
        resolve(None, token, {})
    assert token not in refused.value.message


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", json.dumps({"server": "x", "token": "y"}), "[" * 100_000])
def test_a_broken_login_names_the_file_and_the_remedy(home: Path, content: str) -> None:
    path = save(Credentials(HERE, "by_secret"))
    path.write_text(content)
    with pytest.raises(Failure, match=r"by login|address"):
        load()


def test_an_empty_variable_hides_no_login() -> None:
    save(Credentials(HERE, "by_stored"))
    assert resolve(None, None, {"BLOCKYARD_URL": "", "BLOCKYARD_TOKEN": ""}) == Credentials(HERE, "by_stored")


def test_which_server_a_login_is_for_is_known_where_it_is_of_no_use() -> None:
    save(Credentials(HERE, "by_stored"))
    assert resolve("http://localhost:8080", None, {}) == Credentials("http://localhost:8080", None, elsewhere=HERE)
    assert resolve("http://localhost:8080", "by_other", {}).elsewhere is None
