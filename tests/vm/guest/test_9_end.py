"""The end: nothing failed on the way, and taking it away leaves the state and nothing else."""

import re
from pathlib import Path

from conftest import CHECKOUT, STATE
from machine import run


def test_no_unit_failed_and_no_daemon_left_a_traceback(server):
    assert "blockyard" not in run("systemctl", "list-units", "--failed", "--plain", "--no-legend").stdout
    journal = run("journalctl", "--quiet", "--unit=blockyard-api", "--unit=blockyard-spawner").stdout
    assert "Traceback" not in journal
    assert server.token not in journal
    assert not re.search(r"(?i)segfault|core dumped|watchdog timeout", journal)


def test_removing_it_leaves_the_state_directory_and_nothing_else(server):
    run(CHECKOUT / "scripts" / "up", "--remove")
    assert (STATE / "blockyard.db").exists()
    assert list((STATE / "bundles").iterdir())
    for gone in ("/etc/blockyard", "/opt/blockyard", "/run/blockyard", "/usr/local/bin/by"):
        assert not Path(gone).exists(), gone
    assert "blockyard" not in run("systemctl", "list-unit-files", "--no-legend").stdout
    assert run("pgrep", "--full", "bwrap|blockyard-(api|spawner)", check=False).returncode == 1
