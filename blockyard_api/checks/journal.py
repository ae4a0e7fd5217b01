"""The checks' results as entries of the journal, one each."""

import contextlib
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from cysystemd.journal import send

from blockyard_api.checks.result import Result, Severity

# `journalctl -x` explains it by systemd/blockyard.catalog.
MESSAGE_ID = "a98fe1bc1ce744d7ae0a490567a4a0f7"
_PRIORITIES = {Severity.OK: 6, Severity.INFO: 6, Severity.WARNING: 4, Severity.ERROR: 3}
_JOURNAL = Path("/run/systemd/journal/socket")


def tell(results: Iterable[Result]) -> None:
    """Write each result to the journal, or as a JSON line to standard error where none runs; blocking."""
    for result in results:
        entry: dict[str, object] = {
            "MESSAGE": f"Check {result.name}: {result.severity}. {result.fact} {result.remedy}".strip(),
            "MESSAGE_ID": MESSAGE_ID,
            "PRIORITY": _PRIORITIES[result.severity],
            "SYSLOG_IDENTIFIER": "blockyard-api",
            "BLOCKYARD_CHECK": result.name,
            "BLOCKYARD_SEVERITY": result.severity.value,
            "BLOCKYARD_FACT": result.fact,
            "BLOCKYARD_REMEDY": result.remedy,
        }
        harmless = {name: re.sub(r"[^\x20-\x7e]", "?", str(value)) for name, value in entry.items()}
        with contextlib.suppress(OSError):  # a full disk or a journal that is away must not stop a start
            if _JOURNAL.exists():
                send(**harmless)
            else:
                sys.stderr.write(json.dumps(harmless) + "\n")
                sys.stderr.flush()
