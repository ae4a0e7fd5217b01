"""Whether the firewall's rules still know the workers: those by cgroup forget them when the cgroup is made anew."""

import asyncio
from pathlib import Path

from blockyard_api.checks.context import UNUSED, Context, Seen
from blockyard_api.checks.probe import ProbeFailed
from blockyard_api.checks.result import Result, error, ok
from blockyard_api.hardening.firewall import CGROUP_RECORD, forgotten_cgroup
from blockyard_api.host import accounting


async def firewall(_context: Context, seen: Seen) -> Result:
    """Compare the cgroup that rules were loaded for with the one that workers are in."""
    name = "firewall"
    recorded = await asyncio.to_thread(_read, Path(CGROUP_RECORD))
    if recorded is None:
        return ok(name, "No rules by cgroup were loaded; what workers reach all the same, worker_egress tells.")
    if seen.worker is None:
        return ok(name, UNUSED)
    if isinstance(seen.worker, ProbeFailed):
        return seen.worker.result(name)
    unit = accounting.subtree(seen.worker.cgroup)
    present = None if unit is None else (await asyncio.to_thread(unit.stat)).st_ino
    if forgotten := forgotten_cgroup(recorded, present):
        fact, _semicolon, remedy = forgotten.partition("; run ")
        return error(name, f"{fact}.", f"Run '{remedy.rstrip('.')}'.")
    return ok(name, "The rules by cgroup match the cgroup that workers are in.")


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii")
    except FileNotFoundError:
        return None
