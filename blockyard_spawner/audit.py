"""The audit: one structured entry for each start, spawn, refusal, exit and stop. It never stops the loop."""

import contextlib
import json
import os
import re
import sys

from cysystemd.journal import send

# Kind → MESSAGE_ID; `journalctl -x` explains each by systemd/blockyard.catalog.
MESSAGE_IDS = {
    "start": "ac596c0272ce4e2dae023538eb7e99be",
    "spawn": "c37845a36b50490395fc2e8fb42d61c4",
    "refusal": "3536a04265b641f887ee6e9858fd5c09",
    "stop": "354d12709fb3447f867d3647a4b7a609",
    "exit": "5e3e1abae27a4eb291f7fc337292dd7b",
}


def audit(kind: str, message: str, **fields: object) -> None:
    """Write one entry to the journal, or as a JSON line to stderr where none runs; `fields` become BLOCKYARD_<NAME>."""
    entry: dict[str, object] = {"MESSAGE": message, "MESSAGE_ID": MESSAGE_IDS[kind]}
    entry |= {"PRIORITY": 4 if kind == "refusal" else 6, "SYSLOG_IDENTIFIER": "blockyard-spawner"}
    entry |= {f"BLOCKYARD_{name.upper()}": value for name, value in fields.items() if value is not None}
    entry = {name: re.sub(r"[^\x20-\x7e]", "?", str(value)) for name, value in entry.items()}
    with contextlib.suppress(OSError):  # a full disk or a journal that is away must not end the loop
        if os.path.exists("/run/systemd/journal/socket"):
            send(**entry)
        else:
            sys.stderr.write(json.dumps(entry) + "\n")
