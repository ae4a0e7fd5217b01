"""The Docker backend's units where there is no engine: they start, have no privilege, and say what is missing."""

import os
import re
from pathlib import Path

import pytest
from machine import checks, run, systemctl, unit
from running_pair import simple_app, wait_for

HELPER, SOCKET = "blockyard-spawner-docker.service", "blockyard-spawner-docker.socket"
FIREWALL = "blockyard-firewall-docker.service"


@pytest.fixture(scope="module")
def boxed(server):
    """An app that wants to be a container; the helper's socket is switched on as docs/backends.md says."""
    run("groupadd", "--force", "--system", "docker")
    systemctl("enable", "--now", SOCKET)
    server.deploy("boxed", simple_app())
    # Its start takes longer than the API waits for an answer, where the machine is emulated.
    wait_for(lambda: server.http.patch("/api/v1/apps/boxed", json={"backend": "docker"}).status_code == 200, 60, HELPER)
    yield "boxed"
    server.http.delete("/api/v1/apps/boxed")
    systemctl("disable", "--now", SOCKET, HELPER)
    run("groupdel", "docker")


def test_the_helper_is_started_by_its_first_app_and_tells_that_no_engine_is_there(server, boxed):
    page = server.visitor().get(f"/app/{boxed}/")
    assert page.status_code == 503, page.text
    told = run(
        "journalctl", f"--unit={HELPER}", "--output=cat", "--quiet", "BLOCKYARD_RESULT=docker_unreachable"
    ).stdout
    assert "/run/docker.sock" in told
    assert unit(HELPER, "ActiveState") == "active"
    found = checks(server)["docker_socket"]
    assert found["severity"] == "error"
    assert "The Docker helper does not answer" in found["fact"]


def test_the_helper_has_no_capability_and_its_group_is_all_that_it_has(server, boxed, show):
    wait_for(lambda: unit(HELPER, "ActiveState") == "active", 120, "the helper")
    status = Path(f"/proc/{unit(HELPER, 'MainPID')}/status").read_text()
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert {fields[name] for name in ("CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
    assert fields["NoNewPrivs"] == "1"
    groups = run("getent", "group", "docker").stdout.split(":")
    assert groups[2] in fields["Groups"].split()
    assert groups[3].strip() == ""  # nobody else's
    told = run("systemd-analyze", "security", "--no-pager", HELPER, check=False).stdout.strip().splitlines()[-1]
    show(told.strip("→ "))
    assert float(re.search(r"service: ([\d.]+)", told)[1]) <= 1.5
    verified = run("systemd-analyze", "verify", unit(HELPER, "FragmentPath"), check=False).stderr
    assert "Unknown" not in verified, verified
    assert os.stat("/run/blockyard/spawner-docker.sock").st_mode & 0o777 == 0o660


def test_its_workers_directories_are_a_file_system_of_their_own(server, boxed):
    wait_for(lambda: unit(HELPER, "ActiveState") == "active", 120, "the helper")
    found = run("findmnt", "--noheadings", "--output", "FSTYPE,OPTIONS", "--mountpoint", "/run/blockyard/docker").stdout
    assert found.split()[0] == "tmpfs"
    for option in ("nosuid", "nodev", "noexec", "size=16384k", "nr_inodes=131072", "mode=2710"):
        assert option in found, found
    place = Path("/run/blockyard/docker")
    assert (place.owner(), place.group()) == ("blockyard-docker", "blockyard")


def test_the_rules_for_containers_are_loaded_and_removed_with_their_unit(server):
    run("iptables", "-N", "DOCKER-USER")  # as an engine makes it
    try:
        systemctl("start", FIREWALL)
        loaded = run("iptables", "-S").stdout
        for way in ("DOCKER-USER", "INPUT"):
            assert f"-A {way} -j BLOCKYARD-DOCKER" in loaded
        assert "169.254.169.254" in loaded
        systemctl("reload", FIREWALL)
        assert run("iptables", "-S").stdout == loaded  # nothing piles up
        systemctl("stop", FIREWALL)
        assert "BLOCKYARD" not in run("iptables", "-S").stdout
    finally:
        systemctl("stop", FIREWALL)
        run("iptables", "-X", "DOCKER-USER")
    assert systemctl("start", FIREWALL, check=False).returncode != 0  # no engine, no chain: it says so
    said = run("journalctl", f"--unit={FIREWALL}", "--quiet", "--output=cat").stdout
    assert "DOCKER-USER" in said or "No chain/target/match by that name" in said
    systemctl("reset-failed", FIREWALL)
