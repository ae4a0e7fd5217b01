"""`by deploy`: what is checked before anything is made, and what is left of an attempt that failed."""

import json
import os

import pytest
from fake_server import APP

WHERE = f"apps/{APP['id']}"
ACCEPTED = (202, {"bundle_id": "b" * 32, "task_id": "t"})


@pytest.fixture
def new(server):
    """Let the app be unknown until it is made, and deployments succeed."""
    server.to |= {
        "POST apps": (201, APP),
        f"GET {WHERE}": (200, APP),
        f"DELETE {WHERE}": (204, ""),
        f"POST {WHERE}/bundles": ACCEPTED,
        "GET tasks/t/logs": (200, "2026-01-02T03:04:05.678Z Unpacking.\n2026-01-02T03:04:06.678Z Served.\n"),
        "GET tasks/t": (200, {"status": "completed"}),
    }
    return server


@pytest.fixture
def failing(new):
    new.to["GET tasks/t/logs"] = (200, "2026-01-02T03:04:05.678Z Unpacking.\n2026-01-02T03:04:06.678Z Put it there.\n")
    new.to["GET tasks/t"] = (200, {"status": "failed"})
    return new


def test_a_deployment_is_waited_for_without_a_terminal_too(new, app, by):
    printed = by("deploy", ".", "--yes")
    assert "'hello' is at http://apps/app/hello/" in printed.out
    assert "Packed 1 file, " in printed.err
    assert by("deploy", ".", "--yes", "--wait").out == printed.out


def test_without_waiting_it_is_said_how_to_learn_the_end(new, app, by):
    assert "'by bundles hello' tells" in by("deploy", ".", "--yes", "--no-wait").out
    assert "GET tasks/t" not in new.asked


def test_a_first_deployment_that_fails_leaves_no_app_behind(failing, app, by):
    told = by("deploy", ".", "--yes", status=1).err.splitlines()[-1]
    assert told == "Error: The deployment failed: Put it there; the new app 'hello' is removed again."
    assert failing.asked[-1] == f"DELETE {WHERE}"


def test_so_does_one_whose_upload_is_refused(new, app, by):
    new.to[f"POST {WHERE}/bundles"] = (413, {"error": "bundle_too_large", "message": "Leave out data."})
    told = json.loads(by("deploy", ".", "--yes", "--json", status=1).err)
    assert told == {"error": "bundle_too_large", "message": "Leave out data; the new app 'hello' is removed again."}


def test_an_app_that_was_there_before_stays(failing, app, by):
    failing.to["GET apps/hello"] = (200, APP)
    assert by("deploy", ".", status=1).err.splitlines()[-1] == "Error: The deployment failed: Put it there."
    assert f"DELETE {WHERE}" not in failing.asked


def test_an_app_that_serves_what_somebody_else_has_deployed_meanwhile_stays(failing, app, by):
    failing.to[f"GET {WHERE}"] = (200, APP | {"active_bundle": "c" * 32})
    assert "somebody else has deployed" in by("deploy", ".", "--yes", status=1).err
    assert f"DELETE {WHERE}" not in failing.asked


def test_an_app_that_cannot_be_removed_again_is_named_with_the_command(failing, app, by):
    failing.to[f"DELETE {WHERE}"] = (503, {"error": "unavailable", "message": "Not now."})
    assert "'by delete hello' removes it" in by("deploy", ".", "--yes", status=1).err


def test_a_log_that_breaks_off_removes_nothing(failing, app, by):
    failing.to["GET tasks/t/logs"] = (503, {"error": "unavailable", "message": "Not now."})
    assert by("deploy", ".", "--yes", status=1).err.splitlines()[-1] == "Error: Not now."
    assert f"DELETE {WHERE}" not in failing.asked


def test_a_former_name_deploys_to_the_app_under_its_present_name_and_says_so(new, app, by):
    new.to["GET apps/old"] = (200, APP)
    printed = by("deploy", ".", "--name", "old")
    assert "'old' is a former name of 'hello'" in printed.err
    assert printed.out == "'hello' is at http://apps/app/hello/\n"


@pytest.mark.parametrize(
    ("name", "content", "status", "words"),
    [
        ("absent.tar.gz", None, 1, "There is no"),
        ("notes.tar.gz", b"no archive", 1, "no .tar.gz; pack the app with tar -czf"),
        ("empty.tar.gz", b"", 1, "no .tar.gz"),
        ("2024-app.tar.gz", b"\x1f\x8b", 2, "give one with --name instead of '2024-app'"),
    ],
)
def test_what_cannot_be_deployed_is_said_before_the_server_hears_of_it(
    server, by, tmp_path, name, content, status, words
):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert words in by("deploy", tmp_path / name, "--yes", status=status).err
    assert server.asked == []


def test_a_pipe_is_refused_before_the_server_hears_of_it_and_is_not_waited_for(server, by, tmp_path):
    os.mkfifo(tmp_path / "app.tar.gz")
    told = by("deploy", tmp_path / "app.tar.gz", "--yes", status=1).err
    assert "is neither a directory nor a file; write the .tar.gz into one first" in told
    reading, writing = os.pipe()
    with open(reading, "rb"), open(writing, "wb", buffering=0) as pipe:
        pipe.write(b"\x1f\x8b")
        assert "is neither a" in by("deploy", f"/dev/fd/{reading}", "--name", "hello", "--yes", status=1).err
    assert server.asked == []


def test_a_name_that_cannot_be_is_said_before_anything_is_packed(server, by, tmp_path):
    (tmp_path / "2024-app").mkdir()
    (tmp_path / "2024-app/app.R").write_text("")
    assert "Packed" not in by("deploy", tmp_path / "2024-app", status=2).err


def test_in_json_there_is_nothing_beside_the_result(new, app, by):
    printed = by("deploy", ".", "--yes", "--json")
    assert json.loads(printed.out)["status"] == "completed"
    assert printed.err == ""


def test_a_new_app_needs_consent_which_is_one_sentence(new, app, by):
    assert by("deploy", ".", status=1).err.endswith("Error: There is no app 'hello'; add --yes to create it.\n")
    assert "POST apps" not in new.asked


def test_a_link_that_leads_to_itself_is_one_sentence(server, by, tmp_path):
    (tmp_path / "app.tar.gz").symlink_to("app.tar.gz")
    assert "leads to itself" in by("deploy", tmp_path / "app.tar.gz", status=1).err
    assert "cannot be read" in by("deploy", tmp_path / "app.tar.gz", "--name", "hello", status=1).err
