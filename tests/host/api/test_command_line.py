"""The command line `by` as a user runs it: a process of its own, against the real pair."""

import contextlib
import http.server
import json
import os
import pty
import re
import select
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from running_pair import HELLO, archive, simple_app, wait_for

BY = Path(sys.executable).with_name("by")


class Shell:
    """A user's shell: a home directory and an environment."""

    def __init__(self, home, **environ):
        self.home = home
        self.environ = {"PATH": os.environ["PATH"], "HOME": str(home), "LANG": "C.UTF-8", **environ}

    def by(self, *arguments, status=0, text_input=None):
        done = subprocess.run(
            [BY, *arguments],
            check=False,
            env=self.environ,
            cwd=self.home,
            input=text_input,
            capture_output=True,
            text=True,
            timeout=90,
        )
        assert done.returncode == status, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        if status == 1:
            assert done.stderr.strip().endswith((".", "?", "}")), done.stderr
        return done

    def json(self, *arguments):
        return json.loads(self.by(*arguments, "--json").stdout)

    def on_terminal(self, *arguments, question="", answer=b""):
        """Run on a terminal of its own, answer the question once it is there; return the status and what was shown."""
        pid, terminal = pty.fork()
        if pid == 0:
            os.chdir(self.home)
            os.execve(BY, [str(BY), *arguments], {**self.environ, "TERM": "xterm", "COLUMNS": "200"})
        shown = ""
        answered = not question
        with contextlib.suppress(OSError):  # EIO: the other side is closed
            while select.select([terminal], [], [], 60)[0]:
                shown += os.read(terminal, 65536).decode()
                if not answered and question in shown:
                    os.write(terminal, answer)
                    answered = True
        os.close(terminal)  # hangs up on what is still there
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), shown


@pytest.fixture
def shell(pair, tmp_path):
    """A user who is logged in by his environment."""
    return Shell(tmp_path, BLOCKYARD_URL=pair.control_url, BLOCKYARD_TOKEN=pair.token)


@pytest.fixture
def stranger(tmp_path):
    """A user who is logged in nowhere."""
    return Shell(tmp_path)


@pytest.fixture
def bundle(tmp_path):
    """Write an app's directory."""

    def make(name, files=None):
        for file, text in (files or simple_app()).items():
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_text(text)
        return name

    return make


# --- logging in


def test_a_login_is_verified_kept_privately_and_used(pair, stranger):
    done = stranger.by("login", "--server", pair.control_url + "/", "--token", pair.token)
    assert "admin" in done.stdout
    config = stranger.home / ".config/by/config.json"
    assert stat.S_IMODE(config.stat().st_mode) == 0o600
    assert "apps" in stranger.json("list")
    stranger.by("logout")
    assert not config.exists()
    assert "by login" in stranger.by("list", "--server", pair.control_url, status=1).stderr


def test_a_token_that_the_server_does_not_know_is_not_kept(pair, stranger):
    done = stranger.by("login", "--server", pair.control_url, "--token", "by_wrong", status=1)
    assert "by login" in done.stderr
    assert not (stranger.home / ".config").exists()


def test_a_token_is_asked_for_on_a_terminal_and_not_shown(pair, stranger):
    command = ("login", "--server", pair.control_url)
    status, shown = stranger.on_terminal(*command, question="Token for", answer=pair.token.encode() + b"\n")
    assert status == 0
    assert "Logged in to" in shown
    assert pair.token not in shown
    assert json.loads((stranger.home / ".config/by/config.json").read_text())["token"] == pair.token


def test_without_a_terminal_a_login_says_how_to_give_the_token(pair, stranger):
    assert "--token" in stranger.by("login", "--server", pair.control_url, status=1, text_input="").stderr


def test_no_command_shows_the_token(pair, shell):
    shell.by("login")
    for command in ("list", "tokens list", "admin status", "logout"):
        done = shell.by(*command.split())
        assert pair.token not in done.stdout + done.stderr


def test_a_user_without_a_home_directory_can_use_the_environment(pair, tmp_path):
    command = ["setpriv", "--reuid", "54321", "--regid", "54321", "--clear-groups", "env", "-i"]
    environ = [f"BLOCKYARD_URL={pair.control_url}", f"BLOCKYARD_TOKEN={pair.token}", "LANG=C.UTF-8"]
    done = subprocess.run(
        [*command, *environ, BY, "list"], check=False, capture_output=True, text=True, cwd="/", timeout=60
    )
    assert done.returncode == 0, done.stderr
    done = subprocess.run(
        [*command, *environ, BY, "login"], check=False, capture_output=True, text=True, cwd="/", timeout=60
    )
    assert done.returncode == 1
    assert "BLOCKYARD_TOKEN" in done.stderr


# --- what is wrong with the server


def test_a_server_that_is_not_there_is_said_so_with_the_next_step(stranger):
    done = stranger.by("list", "--server", "http://127.0.0.1:9", status=1)
    assert done.stderr.startswith("Error: Cannot reach http://127.0.0.1:9; is the server running")
    assert json.loads(stranger.by("--json", "list", "--server", "http://127.0.0.1:9", status=1).stderr)["error"]


def test_the_apps_address_is_told_from_the_servers(pair, shell):
    for command in (["list"], ["get", "hello"], ["admin", "status"]):
        assert "where visitors reach apps" in shell.by(*command, "--server", pair.relay_origin, status=1).stderr


def test_a_server_that_is_something_else_is_said_so(stranger):
    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if "apps" in self.path else 502)
            self.end_headers()
            self.wfile.write(b"<html>")

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Other) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            address = f"http://127.0.0.1:{server.server_port}"
            assert "is it a Blockyard server?" in stranger.by("list", "--server", address, status=1).stderr
            assert "HTTP 502" in stranger.by("admin", "status", "--server", address, status=1).stderr
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-command"],
        ["get"],
        ["list", "--no-such-option"],
        ["update", "x"],
        ["scale", "x", "--max-workers", "many"],
        ["update", "x", "--cpu", "nan"],
    ],
)
def test_a_command_used_wrongly_is_status_2(shell, arguments):
    assert "Error: " in shell.by(*arguments, status=2).stderr


def test_help_names_every_command(stranger):
    shown = stranger.by("--help").stdout
    commands = "login logout deploy list get logs bundles rollback enable disable delete update scale tokens admin"
    for command in commands.split():
        assert re.search(rf"^  {command} ", shown, re.MULTILINE)


# --- from nothing to a page, and on


def test_one_command_brings_a_directory_to_a_page(pair, shell):
    done = shell.by("deploy", str(HELLO), "--name", "from-cli", "--yes", "--wait")
    assert f"{pair.relay_origin}/app/from-cli/" in done.stdout
    assert "serves this bundle" in done.stderr
    shell.by("update", "from-cli", "--access", "public")
    assert "Hello from Blockyard" in pair.visitor().get("/app/from-cli/").text


def test_an_archive_and_the_default_name_work_as_well(pair, shell, tmp_path):
    (tmp_path / "My App.tar.gz").write_bytes(archive(simple_app()))
    result = shell.json("deploy", "My App.tar.gz", "--yes")
    assert result["app"] == "my-app"
    assert result["status"] == "completed"
    assert shell.json("get", "my-app")["active_bundle"] == result["bundle_id"]


def test_without_waiting_a_deployment_is_said_to_be_under_way(shell, bundle):
    result = shell.json("deploy", bundle("later"), "--yes", "--no-wait")
    assert result["status"] == "running"
    assert result["task_id"]


def test_a_new_app_is_made_only_with_consent(shell, bundle):
    done = shell.by("deploy", bundle("consent"), status=1)
    assert "--yes" in done.stderr
    shell.by("get", "consent", status=1)
    status, shown = shell.on_terminal("deploy", "consent", question="create it?", answer=b"n\n")
    assert status == 1
    assert "Nothing was deployed" in shown
    shell.by("get", "consent", status=1)
    status, shown = shell.on_terminal("deploy", "consent", question="create it?", answer=b"y\n")
    assert status == 0, shown
    assert "serves this bundle" in shown
    assert "Uploading" in shown


def test_a_bundle_that_the_server_refuses_fails_the_command_with_its_reason(shell, tmp_path):
    (tmp_path / "bad.tar.gz").write_bytes(archive({"notes.txt": "x"}))
    done = shell.by("deploy", "bad.tar.gz", "--yes", status=1)
    assert done.stderr.splitlines()[-1].startswith("Error: The deployment failed: Put app.R")


def test_a_first_deployment_that_fails_leaves_no_app_and_a_later_one_leaves_it_as_it_is(shell, bundle, tmp_path):
    (tmp_path / "bad.tar.gz").write_bytes(archive({"notes.txt": "x"}))
    assert "'second' is removed again" in shell.by("deploy", "bad.tar.gz", "--name", "second", "--yes", status=1).stderr
    shell.by("get", "second", status=1)
    good = shell.json("deploy", bundle("second"), "--yes")["bundle_id"]
    shell.by("deploy", "bad.tar.gz", "--name", "second", status=1)
    assert shell.json("get", "second")["active_bundle"] == good


def test_an_app_below_one_directory_is_served(pair, shell, bundle):
    bundle("outer/inner")
    assert shell.json("deploy", "outer", "--yes")["status"] == "completed"
    shell.by("update", "outer", "--access", "public")
    assert "plain page" in pair.visitor().get("/app/outer/").text


@pytest.mark.parametrize("path", ["absent", "empty"])
def test_what_is_no_app_is_refused_before_an_app_is_made(shell, tmp_path, path):
    (tmp_path / "empty").mkdir()
    shell.by("deploy", path, "--yes", status=1)
    shell.by("get", path, status=1)


def test_a_bundle_that_is_larger_than_the_server_takes_is_refused_with_the_server_s_words(own_pair, tmp_path):
    pair = own_pair('storage.max_bundle_size = "64k"')
    shell = Shell(tmp_path, BLOCKYARD_URL=pair.control_url, BLOCKYARD_TOKEN=pair.token)
    (tmp_path / "large").mkdir()
    (tmp_path / "large/app.R").write_text("")
    (tmp_path / "large/data").write_bytes(os.urandom(8 << 20))
    done = shell.by("deploy", "large", "--yes", "--json", status=1)
    assert json.loads(done.stderr)["error"] == "bundle_too_large"
    shell.by("get", "large", status=1)


def test_bundles_are_listed_and_rolled_back_and_forth(shell, bundle):
    first = shell.json("deploy", bundle("rolling"), "--yes")["bundle_id"]
    second = shell.json("deploy", "rolling")["bundle_id"]
    listed = shell.json("bundles", "rolling")["bundles"]
    assert [one["id"] for one in listed] == [second, first]
    assert shell.json("rollback", "rolling")["active_bundle"] == first
    assert second in shell.by("rollback", "rolling", second[:12]).stdout
    table = shell.by("bundles", "rolling").stdout.splitlines()
    assert [line.split()[2] for line in table] == ["ACTIVE", "yes", "no"]
    assert "Error: " in shell.by("rollback", "rolling", "no-such-bundle", status=1).stderr


def test_why_a_deployment_failed_is_told_beside_its_bundle(shell, bundle):
    shell.by("deploy", bundle("failing"), "--yes")
    bundle("failing", {"app.R": "runApp(list(ui = 1, server = function(input, output) {}))\n"})
    shell.by("deploy", "failing", status=1)
    told, served = shell.by("bundles", "failing").stdout.splitlines()[1:]
    assert "failed: app.R ends by calling runApp() itself" in told
    assert "ready" in served
    assert shell.json("get", "failing")["active_bundle"] == served.split()[0]


def test_settings_are_changed_and_taken_back(shell, bundle):
    shell.by("deploy", bundle("settings"), "--yes")
    changed = shell.json(
        "update", "settings", "--title", "A {title}", "--description", "What for", "--access", "logged_in",
        "--memory", "512m", "--cpu", "0.5", "--max-workers", "3", "--sessions-per-worker", "2", "--pre-warmed", "0",
        "--network", "none", "--scratch-copy",
    )  # fmt: skip
    wanted = {
        "title": "A {title}", "description": "What for", "access_type": "logged_in", "memory_limit": "512m",
        "cpu_limit": 0.5, "max_workers_per_app": 3, "max_sessions_per_worker": 2, "pre_warmed_sessions": 0,
        "network": "none", "scratch_copy": True,
    }  # fmt: skip
    assert {key: changed[key] for key in wanted} == wanted
    cleared = shell.json(
        "update", "settings", "--memory", "none", "--cpu", "none", "--max-workers", "none", "--network", "default",
        "--no-scratch-copy", "--title", "",
    )  # fmt: skip
    keys = ("memory_limit", "cpu_limit", "max_workers_per_app", "network")
    assert [cleared[key] for key in keys] == [None] * 4
    assert cleared["scratch_copy"] is False
    assert cleared["title"] == ""
    assert (
        shell.json("scale", "settings", "--max-workers", "2", "--sessions-per-worker", "4")["max_workers_per_app"] == 2
    )
    assert "'settings-2' is changed" in shell.by("update", "settings", "--name", "settings-2").stdout
    assert "Error: " in shell.by("update", "settings-2", "--memory", "-512m", status=2).stderr
    assert "'--cpu'" in shell.by("update", "settings-2", "--cpu", "0", status=2).stderr
    assert "'--title'" in shell.by("update", "settings-2", "--title", "two\nlines", status=2).stderr


def test_an_app_is_switched_off_and_on_and_deleted(pair, shell, bundle):
    shell.by("deploy", bundle("switched"), "--yes")
    shell.by("update", "switched", "--access", "public")
    assert "by enable switched" in shell.by("disable", "switched").stdout
    assert pair.visitor().get("/app/switched/").status_code == 503
    shell.by("enable", "switched")
    assert "plain page" in pair.visitor().get("/app/switched/").text
    assert "--yes" in shell.by("delete", "switched", status=1).stderr
    assert shell.json("delete", "switched", "--yes") == {"deleted": "switched"}
    assert "Error: " in shell.by("get", "switched", status=1).stderr


def test_apps_are_listed_for_people_and_for_programs(shell, bundle):
    shell.by("deploy", bundle("listed-one"), "--yes")
    shell.by("update", "listed-one", "--title", "\u202eodd [bold]title[/bold]")
    found = shell.json("list", "--search", "listed-one")["apps"]
    assert [one["name"] for one in found] == ["listed-one"]
    heading, row = shell.by("list", "--search", "listed-one").stdout.splitlines()
    assert heading.split()[:2] == ["NAME", "STATUS"]
    assert row.startswith("listed-one ")
    assert "\\x202eodd [bold]title[/bold]" in row
    assert "No app has 'no such app anywhere'" in shell.by("list", "--search", "no such app anywhere").stderr


def test_an_app_is_shown_with_what_runs(pair, shell):
    shell.by("deploy", str(HELLO), "--name", "shown", "--yes")
    shell.by("update", "shown", "--access", "public")
    assert "No worker has run yet" in shell.by("get", "shown", "--runtime").stderr
    pair.visitor().get("/app/shown/")
    assert re.search(r"^status +running *$", shell.by("get", "shown").stdout, re.MULTILINE)
    worker = shell.json("get", "shown", "--runtime")["runtime"]["workers"][0]["id"]
    assert re.search(rf"^{worker} +active ", shell.by("get", "shown", "--runtime").stdout, re.MULTILINE)


LOUD = """
message("loud \\033]0;title\\007 one")
"""


def test_a_log_is_raw_in_a_pipe_and_harmless_on_a_terminal(pair, shell, bundle):
    shell.by("deploy", bundle("loud", simple_app(LOUD)), "--yes")
    assert "has written nothing yet" in shell.by("logs", "loud").stderr
    shell.by("update", "loud", "--access", "public")
    pair.visitor().get("/app/loud/")
    worker = shell.json("get", "loud", "--runtime")["runtime"]["workers"][0]["id"]
    wait_for(lambda: "one" in shell.by("logs", "loud").stdout, what="the app's message")
    assert "loud \x1b]0;title\x07 one\n" in shell.by("logs", "loud", "-w", worker[:4]).stdout
    status, shown = shell.on_terminal("logs", "loud")
    assert status == 0
    assert "loud \\x1b]0;title\\x07 one" in shown
    assert "\x1b]" not in shown
    lines = [json.loads(line)["line"] for line in shell.by("logs", "loud", "--json").stdout.splitlines()]
    assert "loud \x1b]0;title\x07 one" in lines
    assert "Error: " in shell.by("logs", "loud", "--worker", "nosuchworker", status=1).stderr


def test_a_followed_log_shows_what_comes_and_ends_quietly_on_an_interrupt(pair, shell):
    shell.by("deploy", str(HELLO), "--name", "followed", "--yes")
    shell.by("update", "followed", "--access", "public")
    visitor = pair.visitor()
    visitor.get("/app/followed/")
    with subprocess.Popen(
        [BY, "logs", "followed", "--follow"],
        env=shell.environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as following:
        with visitor.shiny("followed"):
            for line in following.stdout:
                if "a session began" in line:
                    break
            else:
                pytest.fail("the log ended early: " + following.stderr.read())
        following.send_signal(signal.SIGINT)
        _, errors = following.communicate(timeout=20)
    assert following.returncode == 130
    assert errors == ""


def test_an_interrupted_question_is_status_130_and_changes_nothing(shell, bundle):
    shell.by("deploy", bundle("asked"), "--yes")
    status, shown = shell.on_terminal("delete", "asked", question="Delete", answer=b"\x03")
    assert status == 130
    assert "Traceback" not in shown
    shell.by("get", "asked")


def test_output_into_a_pipe_that_closes_is_no_traceback(shell):
    script = f"'{BY}' list --json | true"
    done = subprocess.run(
        ["sh", "-c", script], env=shell.environ, check=True, capture_output=True, text=True, timeout=60
    )
    assert "Traceback" not in done.stderr


# --- tokens and the server


def test_a_token_is_shown_once_works_and_is_revoked(pair, shell):
    made = shell.json("tokens", "create", "for a test", "--days", "7")
    other = Shell(shell.home, BLOCKYARD_URL=pair.control_url, BLOCKYARD_TOKEN=made["token"])
    other.by("list")
    listed = shell.by("tokens", "list").stdout
    assert made["id"] in listed
    assert "for a test" in listed
    assert made["token"] not in listed + shell.by("tokens", "list", "--json").stdout
    shell.by("tokens", "revoke", made["id"])
    assert "by login" in other.by("list", status=1).stderr


def test_a_new_token_in_a_pipe_is_the_token_alone(shell):
    done = shell.by("tokens", "create")
    assert re.fullmatch(r"by_\S+\n", done.stdout)
    assert "not shown again" in done.stderr


def test_the_server_is_shown_and_checked(pair, shell):
    assert shell.json("admin", "status")["spawner"]["connected"] is True
    assert re.search(r"^spawner connected +yes *$", shell.by("admin", "status").stdout, re.MULTILINE)
    assert "by login" in Shell(shell.home, BLOCKYARD_URL=pair.control_url).by("admin", "check", status=1).stderr
