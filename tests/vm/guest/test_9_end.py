"""The end: nothing failed on the way."""

import re

from machine import run


def test_no_unit_failed_and_no_daemon_left_a_traceback(server):
    assert "blockyard" not in run("systemctl", "list-units", "--failed", "--plain", "--no-legend").stdout
    journal = run("journalctl", "--quiet", "--unit=blockyard-api", "--unit=blockyard-spawner").stdout
    assert "Started" in journal
    assert "Traceback" not in journal
    assert server.token not in journal
    assert not re.search(r"(?i)segfault|core dumped|watchdog timeout|was never awaited|never retrieved", journal)
