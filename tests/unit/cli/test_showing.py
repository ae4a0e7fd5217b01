"""What commands show of apps, workers, bundles and tokens, and how ids are taken from there."""

import pytest
from fake_server import APP

WORKERS = ["aaaa1111" + "0" * 24, "aaaa2222" + "0" * 24]
BUNDLES = ["bbbb1111" + "0" * 24, "bbbb2222" + "0" * 24]
TOKENS = ["cccc1111-0000-4000-8000-000000000000", "dddd2222-0000-4000-8000-000000000000"]
MOMENT = "2026-01-02T03:04:05.678Z"
STATS = {"cpu_percent": 31.4, "memory_usage_bytes": 100 << 20, "memory_limit_bytes": 512 << 20}


def worker(identity, **values):
    return {
        "id": identity, "bundle_id": BUNDLES[0], "status": "active", "started_at": MOMENT,
        "sessions": [], "stats": None, "limits_hit": [], "end_reason": None, **values,
    }  # fmt: skip


@pytest.fixture
def known(server):
    bundles = [
        {"id": one, "status": "ready", "uploaded_at": MOMENT, "deployed_by": "admin", "pinned": False}
        for one in BUNDLES
    ]  # fmt: skip
    tokens = [
        {"id": one, "name": year, "created_at": f"{year}-01-01T00:00:00.000Z", "last_used_at": None,
         "expires_at": f"{year}-12-31T00:00:00.000Z"}
        for one, year in zip(TOKENS, ("2020", "2999"), strict=True)
    ]  # fmt: skip
    server.to |= {
        "GET apps/hello": (200, APP),
        "GET apps/hello/runtime": (200, {"workers": [worker(one) for one in WORKERS]}),
        "GET apps/hello/logs": (200, "a line\n"),
        "GET apps/hello/bundles": (200, {"bundles": bundles}),
        "POST apps/hello/rollback": (200, APP),
        "GET users/me/tokens": (200, {"tokens": tokens}),
        f"DELETE users/me/tokens/{TOKENS[0]}": (204, ""),
    }
    return server


TAKES_IDS = [("logs", "hello", "-w", "aaaa"), ("rollback", "hello", "bbbb")]


@pytest.mark.parametrize("command", TAKES_IDS, ids=lambda words: words[0])
def test_what_begins_one_id_stands_for_it(known, by, command):
    by(*command[:-1], command[-1] + "1111")
    by(*command[:-1], (WORKERS if command[0] == "logs" else BUNDLES)[0])


def test_a_token_is_revoked_by_what_its_id_begins_with(known, by):
    by("tokens", "revoke", "cccc")
    assert known.asked[-1] == f"DELETE users/me/tokens/{TOKENS[0]}"


@pytest.mark.parametrize("command", TAKES_IDS, ids=lambda words: words[0])
def test_what_begins_two_ids_or_none_is_one_sentence(known, by, command):
    assert "2 " in (told := by(*command, status=1).err)
    assert "give more of it" in told
    assert "'by " in by(*command[:-1], "ffff", status=1).err


def test_workers_are_shown_with_what_they_use_ran_into_and_ended_of(known, by):
    workers = [
        worker(WORKERS[0], sessions=[{}, {}], stats=STATS, limits_hit=["full /tmp"]),
        worker(WORKERS[1], status="ended", end_reason="exited with status 1"),
    ]
    known.to["GET apps/hello/runtime"] = (200, {"workers": workers})
    first, second = by("get", "hello", "--runtime").out.splitlines()[-2:]
    assert first.startswith(f"{WORKERS[0]}  active; full /tmp  ")
    assert "2 visitors, 31 % CPU, 100.0 MB of 512.0 MB" in first
    assert second.startswith(f"{WORKERS[1]}  ended; exited with status 1  ")


def test_a_search_that_finds_nothing_is_not_taken_for_a_server_without_apps(server, by):
    server.to["GET apps"] = (200, {"apps": [], "total": 0})
    assert by("list", "--search", "xyz").err.startswith("No app has 'xyz' in its name, title or description")
    assert by("list").err.startswith("There are no apps")


def test_a_disabled_app_is_listed_as_such(server, by):
    server.to["GET apps"] = (200, {"apps": [APP | {"enabled": False}], "total": 1})
    assert by("list").out.splitlines()[1].split()[:2] == ["hello", "disabled"]


def test_a_change_is_told_in_the_words_of_the_command_line(server, by):
    values = {"title": "", "network": None, "backend": None, "memory_limit": "1g", "scratch_copy": True}
    server.to["PATCH apps/hello"] = (200, APP | values)
    told = by(
        "update", "hello", "--title", "", "--network", "default", "--backend", "default", "--memory", "1g",
        "--scratch-copy",
    ).out  # fmt: skip
    assert "title empty" in told
    assert "memory 1g" in told
    assert "scratch-copy yes" in told
    assert "network the server's default" in told
    assert "None" not in told


def test_a_token_that_has_expired_is_marked(known, by):
    old, other = by("tokens", "list").out.splitlines()[1:]
    assert "2020-12-31T00:00:00.000Z (expired)" in old
    assert "expired" not in other


def test_what_may_be_left_out_has_one_pair_of_brackets_in_the_usage(by):
    usage = by("rollback", "--help").out.splitlines()[0]
    assert " [BUNDLE]" in usage
    assert "[[" not in usage
