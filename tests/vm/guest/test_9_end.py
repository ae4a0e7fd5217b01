"""The end: nothing failed on the way, and taking it away leaves the state and nothing else."""

import re

from machine import run

# Where names of ours may be left: the state, the user that owns it, and what is not of this server.


def test_no_unit_failed_and_no_daemon_left_a_traceback(server):
    assert "blockyard" not in run("systemctl", "list-units", "--failed", "--plain", "--no-legend").stdout
    journal = run("journalctl", "--quiet", "--unit=blockyard-api", "--unit=blockyard-spawner").stdout
    assert "Started" in journal
    assert "Traceback" not in journal
    assert server.token not in journal
    assert not re.search(r"(?i)segfault|core dumped|watchdog timeout|was never awaited|never retrieved", journal)
