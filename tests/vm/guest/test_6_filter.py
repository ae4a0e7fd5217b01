"""The system call filter on this Debian: compiled by its libseccomp, taken by its kernel, kept by `scripts/up`."""

import json
import os
import re
import stat
from pathlib import Path

import httpx
import pytest
from conftest import CHECKOUT, UP_WITHIN
from machine import answers, run, systemctl, unit
from running_pair import simple_app

FILTER = Path("/etc/blockyard/seccomp.bpf")
SPAWNER = "blockyard-spawner.service"
# Numbers of x86-64. The spawner's unit has a filter of systemd's, which workers inherit; it would let keyctl pass.
CALLS = {
    "keyctl": [250, 0, -3 & 0xFFFFFFFF, 1],
    "unshare": [272, 0],
    "userfaultfd": [323, 1],
    "io_uring_setup": [425, 0, 0],
    "clone3": [435, 0, 0],
    "socket, vsock": [41, 40, 1, 0],
    "socket, netlink route": [41, 16, 3, 0],
    "socket, tcp": [41, 2, 1, 0],
}


def install():
    return run("/opt/blockyard/venv/bin/by", "admin", "install-seccomp")


def test_the_filter_is_roots_and_installing_it_again_changes_nothing(server):
    status = FILTER.stat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (0, 0, 0o644)
    assert install().stdout.strip().endswith("tried out; unchanged.")
    assert FILTER.stat().st_mtime_ns == status.st_mtime_ns


def test_a_worker_gets_the_answers_of_the_policy(server):
    program = (CHECKOUT / "tests" / "host" / "spawner" / "forbidden_calls.py").read_text()
    asked = "system('/usr/bin/python3 -I forbidden_calls.py calls.json', intern = TRUE)"
    files = simple_app(ui=f"fluidPage(HTML({asked}))") | {
        "forbidden_calls.py": program,
        "calls.json": json.dumps(CALLS),
    }
    server.deploy("caller", files)
    page = server.visitor().get("/app/caller/").text
    told = json.loads(re.search(r"CALLS (\{.*?\})", page)[1])
    refused = dict.fromkeys(("keyctl", "unshare", "userfaultfd", "io_uring_setup", "socket, vsock"), "EPERM")
    terminal = dict.fromkeys(("TIOCSTI", "TIOCSTI, more than 32 bits"), "EPERM")
    allowed = dict.fromkeys(("socket, netlink route", "socket, tcp"), "done")
    assert told == {**refused, **terminal, **allowed, "clone3": "ENOSYS", "int 0x80": "SIGSYS"}


@pytest.mark.timeout(UP_WITHIN + 120)
def test_a_filter_that_is_not_the_policys_is_replaced_and_the_spawner_alone_restarted(server):
    right = FILTER.read_bytes()
    FILTER.write_bytes(right[:-8])
    before = {name: unit(name, "InvocationID") for name in (SPAWNER, "blockyard-api.service")}
    again = run(CHECKOUT / "scripts" / "up", timeout=UP_WITHIN)
    assert f"{FILTER}: " in again.stdout
    assert FILTER.read_bytes() == right
    after = {name: unit(name, "InvocationID") for name in before}
    assert [name for name in before if after[name] != before[name]] == [SPAWNER]
    answers(server)


def test_without_its_filter_the_spawner_does_not_start_and_says_what_to_do(server):
    aside = FILTER.with_name("aside")
    os.rename(FILTER, aside)
    try:
        systemctl("restart", SPAWNER, check=False)
        # Whoever connects meanwhile has systemd try again, so the unit's present state says nothing.
        said = run("journalctl", f"--unit={SPAWNER}", "--output=cat", "--lines=40").stdout
        assert "status=2" in said
        assert "'process.seccomp_profile' cannot be read; run `by admin install-seccomp`" in said
    finally:
        aside.unlink()
        told = install().stdout  # the remedy, as it says
        systemctl("reset-failed", SPAWNER, "blockyard-spawner.socket", check=False)
        systemctl("start", "blockyard-spawner.socket", SPAWNER)
    assert "restart blockyard-spawner to use it" in told
    answers(server)
    assert httpx.get("http://127.0.0.1:8080/app/hello/", follow_redirects=True, timeout=120).status_code == 200
