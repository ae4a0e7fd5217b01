"""The audit's entries, as JSON lines where no journal runs."""

import json
import re
from pathlib import Path

from blockyard_spawner.audit import MESSAGE_IDS, audit

CATALOG = Path(__file__).parents[3] / "systemd/blockyard.catalog"


def entries(capsys):
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_an_entry_has_its_id_and_fields(capsys):
    audit("spawn", "Worker started.", worker="w1", uid=60000, result="ok", cgroup=None)
    assert entries(capsys) == [
        {
            "MESSAGE": "Worker started.",
            "MESSAGE_ID": MESSAGE_IDS["spawn"],
            "PRIORITY": "6",
            "SYSLOG_IDENTIFIER": "blockyard-spawner",
            "BLOCKYARD_WORKER": "w1",
            "BLOCKYARD_UID": "60000",
            "BLOCKYARD_RESULT": "ok",
        }
    ]


def test_no_text_of_a_peer_makes_a_second_line_or_moves_the_cursor(capsys):
    audit("refusal", 'x\n{"MESSAGE": "forged"}\x1b[2J\r\x00\u2028', app="a\nb")
    assert [entry["MESSAGE"] for entry in entries(capsys)] == ['x?{"MESSAGE": "forged"}?[2J???']


def test_a_stream_that_cannot_be_written_does_not_stop_anything(monkeypatch):
    with Path("/dev/full").open("w", buffering=1) as full:
        monkeypatch.setattr("sys.stderr", full)
        audit("exit", "Ended.")
        monkeypatch.undo()
        full.buffer.raw.close()


def test_every_kind_of_entry_is_explained_in_the_catalogue():
    explained = re.findall(r"^-- ([0-9a-f]{32})$", CATALOG.read_text(), re.MULTILINE)
    assert set(explained) >= set(MESSAGE_IDS.values())
    assert len(set(explained)) == len(explained)
