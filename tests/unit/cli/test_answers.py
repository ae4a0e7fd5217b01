"""What commands make of servers that are none, or not the right ones."""

import http.server
import json
import socket
import ssl
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from fake_server import APP

BY = Path(sys.executable).with_name("by")
EVERY_COMMAND = [
    ["login"], ["list"], ["get", "hello"], ["get", "hello", "--runtime"], ["logs", "hello"], ["bundles", "hello"],
    ["rollback", "hello"], ["enable", "hello"], ["disable", "hello"], ["delete", "hello", "--yes"],
    ["update", "hello", "--title", "x"], ["scale", "hello", "--max-workers", "1"], ["deploy", ".", "--yes"],
    ["tokens", "list"], ["tokens", "create"], ["tokens", "revoke", "0123456789abcdef0123456789abcdef"],
    ["admin", "status"], ["admin", "check"],
]  # fmt: skip


@pytest.mark.parametrize("answer", [{}, [], "<html>", {"apps": 1, "name": 1, "tokens": [{}]}, {"name": "hello"}, None])
@pytest.mark.parametrize("command", EVERY_COMMAND, ids=" ".join)
def test_a_server_that_answers_something_else_is_asked_about_and_nothing_is_believed(server, by, app, command, answer):
    server.otherwise = (200, answer, {"Content-Type": "application/json"})
    printed = by(*command, status=1)
    assert printed.err.count("Error: ") == 1
    assert printed.err.strip().endswith("is it a Blockyard server?")
    assert printed.out == ""


NESTED = "[" * 100_000


@pytest.mark.parametrize("status", [200, 400, 500])
def test_json_that_is_nested_too_deeply_to_be_read_is_no_servers(server, by, status):
    server.otherwise = (status, NESTED, {"Content-Type": "application/json"})
    assert by("list", status=1).err.strip().endswith("is it a Blockyard server?")


def test_neither_is_what_is_too_deep_to_be_printed(server, by):
    nested = []
    for _ in range(900):
        nested = [nested]
    server.otherwise = (200, APP | {"more": nested})
    for command in (["get", "hello"], ["get", "hello", "--json"]):
        assert "answered something else than was asked for" in by(*command, status=1).err


def test_a_login_is_kept_only_where_a_blockyard_server_knows_the_token(server, by, tmp_path):
    server.to["GET users/me"] = (200, {"sub": "admin", "name": "", "role": "admin"})
    by("login", "--token", "by_good")
    kept = (tmp_path / ".config/by/config.json").read_text()
    assert "by_good" in kept
    server.to["GET users/me"] = (200, {})
    by("login", "--token", "by_other", status=1)
    assert (tmp_path / ".config/by/config.json").read_text() == kept


def test_a_redirect_names_the_address_to_use_instead(server, by):
    server.otherwise = (301, "", {"Location": "https://by.example.org/api/v1/users/me"})
    assert "by login --server https://by.example.org'" in by("login", status=1).err
    server.otherwise = (302, "", {"Location": "/signin?next=x"})
    assert f"sends everybody to {server.url}/signin?next=x; is it a Blockyard server?" in by("list", status=1).err


def test_the_address_of_the_apps_is_told_from_the_servers(server, by):
    server.otherwise = (404, {"error": "not_found", "message": "There is no app at this address."})
    assert "where visitors reach apps; give the address they are managed at" in by("get", "hello", status=1).err


def test_who_is_logged_in_elsewhere_is_told_where(server, by, monkeypatch):
    server.to["GET users/me"] = (200, {"sub": "admin", "name": "", "role": "admin"})
    by("login")
    monkeypatch.delenv("BLOCKYARD_TOKEN")
    other = server.url.replace("127.0.0.1", "localhost")
    server.otherwise = (401, {"error": "unauthorized", "message": "Send an access token; 'by login' keeps one."})
    assert by("list", "--server", other, status=1).err.startswith(f"Error: Your login is for {server.url} and not for")


def self_signed(directory):
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "key", "-out", "certificate",
         "-days", "1", "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"],
        cwd=directory, check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "certificate", directory / "key")
    return context


def test_a_certificate_that_is_not_trusted_is_named_as_the_reason(by, tmp_path, monkeypatch):
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as listening:
        listening.socket = self_signed(tmp_path).wrap_socket(listening.socket, server_side=True)
        thread = threading.Thread(target=listening.serve_forever, args=(0.01,))
        thread.start()
        try:
            address = f"https://127.0.0.1:{listening.server_port}"
            told = by("list", "--server", address, status=1).err
            assert f"The certificate of {address} is not accepted (self" in told
            monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "certificate"))  # the remedy that it names
            assert "HTTP 501" in by("list", "--server", address, status=1).err
        finally:
            listening.shutdown()
            thread.join()


def test_certificates_that_cannot_be_read_are_named_as_such(by, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere")
    assert "correct or unset SSL_CERT_FILE" in by("list", status=1).err


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:9", "nonsense://127.0.0.1:9"])
def test_a_proxy_that_cannot_be_used_is_named_as_such(by, monkeypatch, proxy):
    monkeypatch.setenv("ALL_PROXY", proxy)
    assert "what ALL_PROXY, HTTP_PROXY and HTTPS_PROXY name" in by("list", status=1).err


def test_tls_where_there_is_none_is_said_with_the_other_address(server, by):
    told = by("list", "--server", server.url.replace("http:", "https:"), status=1).err
    assert told.strip().endswith(f"is its address {server.url}?")


def test_a_connection_that_breaks_hints_at_tls(by):
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def hang_up():
            listening.accept()[0].close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        told = by("list", "--server", f"http://127.0.0.1:{listening.getsockname()[1]}", status=1).err
        thread.join()
    assert "https://" in told


# --- exit status and standard streams


def test_what_the_server_finds_wrong_with_a_value_is_wrong_use_in_the_words_of_the_command_line(server, by):
    server.to["PATCH apps/hello"] = (
        400, {"error": "invalid_request", "message": "Correct 'max_sessions_per_worker': Input should be less."}
    )  # fmt: skip
    told = by("update", "hello", "--sessions-per-worker", "99999", status=2).err
    assert told == "Error: Correct '--sessions-per-worker': Input should be less.\n"
    server.to["PATCH apps/hello"] = (400, {"error": "invalid_limit", "message": "A limit must be 'this'."})
    assert by("update", "hello", "--memory", "-1", status=2).err == "Error: A limit must be 'this'.\n"
    server.to["PATCH apps/hello"] = (409, {"error": "conflict", "message": "Not now."})
    by("update", "hello", "--memory", "1g", status=1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["update", "hello", "--access", "everyone"], "--access"),
        (["update", "hello", "--network", "some"], "--network"),
        (["update", "hello", "--backend", "podman"], "--backend"),
        (["scale", "hello", "--sessions-per-worker", "none"], "--sessions-per-worker"),
        (["scale", "hello", "--max-workers", "9" * 5000], "--max-workers"),
        (["update", "hello", "--refresh-schedule", "daily"], "--refresh-schedule"),
        (["get", ""], "A name has 1 to 63"),
        (["get", "a/b"], "A name has 1 to 63"),
        (["update", "hello", "--name", "a/b"], "A name has 1 to 63"),
        (["deploy", "hello", "--name", "2024-app"], "A name has 1 to 63"),
        (["tokens", "create", " "], "what the token is for"),
        (["list", "--token", ""], "--token is empty"),
        (["list", "--server", f"http://{'a' * 64}"], "is no server's address"),
        (["list", "--search", "\udcff"], "no UTF-8"),
        (["update", "hello", "--title", "\udcff"], "no UTF-8"),
        (["logs", "hello", "--worker", "\udcff" * 32], "no UTF-8"),
        (["tokens", "create", "\udcff"], "no UTF-8"),
        (["tokens", "revoke", "\udcff" * 32], "no UTF-8"),
        (["list", "--server"], "'--server' requires an argument"),
        (["get", "hello", "--token"], "'--token' requires an argument"),
        (["no-such-command"], "No such command"),
        (["rollback", "hello", "abc"], "at least 4 characters"),
    ],
)
def test_wrong_use_is_found_before_the_server_hears_of_it_and_is_one_object_in_json(server, by, arguments, words):
    assert words in by(*arguments, status=2).err
    told = json.loads(by(*arguments, "--json", status=2).err)
    assert words in told["message"]
    assert server.asked == []


def test_output_that_cannot_be_written_is_one_sentence(server, by, tmp_path):
    by("list", status=1)  # has the environment that the process takes over
    server.otherwise = (200, {"apps": [APP], "total": 1})
    for option in ([], ["--json"]):
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(
                [BY, "list", *option], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False
            )
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1
        assert "Standard output cannot be used (No space left on device)" in done.stderr


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_standard_stream_that_is_closed_is_as_good_as_an_empty_one(server, by, closed):
    by("list", status=1)  # has the environment that the process takes over
    server.otherwise = (200, {"apps": [APP], "total": 1})
    done = subprocess.run(
        ["sh", "-c", f'"$0" list {closed}', BY], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0
    assert ("hello" in done.stdout) == (">&-" not in closed.split())
    assert done.stderr == ""


def test_what_the_outputs_encoding_lacks_is_written_as_an_escape(server, by, monkeypatch):
    by("list", status=1)  # has the environment that the process takes over
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    server.to["GET apps/hello/logs"] = (200, "gr\u00fcn \u65e5\n")
    server.to["GET apps"] = (200, {"apps": [APP | {"title": "gr\u00fcn"}], "total": 1})
    for command, shown in (["logs", "hello"], "gr\\xfcn \\u65e5\n"), (["list"], "gr\\xfcn  "):
        done = subprocess.run([BY, *command], capture_output=True, encoding="ascii", timeout=60, check=False)
        assert done.returncode == 0
        assert shown in done.stdout


# --- logging in


def answering(token):
    return lambda _: token


def at_its_end(_):
    raise EOFError


@pytest.mark.parametrize("prompt", [answering(""), at_its_end])
def test_no_answer_to_the_question_for_the_token_changes_nothing(server, by, monkeypatch, tmp_path, prompt):
    server.to["GET users/me"] = (200, {"sub": "admin", "name": "", "role": "admin"})
    by("login")
    kept = (tmp_path / ".config/by/config.json").read_text()
    monkeypatch.delenv("BLOCKYARD_TOKEN")
    monkeypatch.setattr("blockyard_api.cli.main.getpass", prompt)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    server.asked.clear()
    assert "No token was given, so nothing has changed" in by("login", status=1).err
    assert server.asked == []
    assert (tmp_path / ".config/by/config.json").read_text() == kept
