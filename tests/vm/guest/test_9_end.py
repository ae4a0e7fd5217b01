"""The end: nothing failed on the way, and taking it away leaves the state and nothing else."""

import pwd
import re
from pathlib import Path

from conftest import CHECKOUT, STATE
from machine import WORKERS, run, systemctl

# Where names of ours may be left: the state, the user that owns it, and what is not of this server.
KEPT = (str(STATE), str(CHECKOUT), "/opt/guest-tests", "/proc", "/sys", "/tmp", "/var/tmp", "/usr/share", "/dev")


def test_no_unit_failed_and_no_daemon_left_a_traceback(server):
    assert "blockyard" not in run("systemctl", "list-units", "--failed", "--plain", "--no-legend").stdout
    journal = run("journalctl", "--quiet", "--unit=blockyard-api", "--unit=blockyard-spawner").stdout
    assert "Started" in journal
    assert "Traceback" not in journal
    assert server.token not in journal
    assert not re.search(r"(?i)segfault|core dumped|watchdog timeout|was never awaited|never retrieved", journal)


def test_removing_it_leaves_the_state_directory_and_nothing_else(server):
    run("by", "admin", "install-apparmor")
    systemctl("enable", "--now", "blockyard-firewall")
    for form in ("nft-cgroup", "iptables-owner", "systemd"):
        run("sh", "-c", f"by admin firewall --format {form} --apply-with | sh -e")
    run(CHECKOUT / "scripts" / "up", "--remove")
    assert (STATE / "blockyard.db").exists()
    assert list((STATE / "bundles").iterdir())
    assert pwd.getpwnam("blockyard").pw_uid == STATE.stat().st_uid
    assert run("getent", "group", "blockyard-admin", check=False).returncode == 2
    pruned = [word for place in KEPT for word in ("-path", place, "-prune", "-o")]
    left = run("find", "/", *pruned, "-iname", "*blockyard*", "-print", "-o", "-path", "/usr/local/bin/by", "-print")
    assert left.stdout.split() == []
    assert "blockyard" not in run("systemctl", "list-unit-files", "--no-legend").stdout
    assert "blockyard" not in run("systemctl", "list-units", "--all", "--plain", "--no-legend").stdout
    assert "Defined-By: Blockyard" not in run("journalctl", "--dump-catalog").stdout
    assert not WORKERS.exists()
    assert not list(Path("/sys/kernel/security/apparmor/policy/profiles").glob("blockyard.*"))
    for tool in (("nft", "list", "ruleset"), ("iptables", "-S"), ("ip6tables", "-S")):
        assert "blockyard" not in run(*tool).stdout.lower()
    assert run("pgrep", "--full", "bwrap|blockyard-(api|spawner)", check=False).returncode == 1
