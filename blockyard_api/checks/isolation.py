"""What this installation isolates apps by, and by what not, in one line. Pure: it follows from what the checks found.

Each word stands for something that a worker saw, or that the kernel or a helper said of it, and for nothing else.
"""

from collections.abc import Iterator, Sequence

from blockyard_api.checks.context import Outcome
from blockyard_api.checks.network import METADATA
from blockyard_api.checks.probe import ProbeFailed, Report
from blockyard_api.checks.result import Result, Severity

_LIMITS = {"memory": "memory", "cpu": "CPU", "pids": "number of processes"}
_NOT_THERE = "ENOENT"
_NOBODY_LISTENS = "ECONNREFUSED"  # to an abstract socket that is listened on: so in another network namespace
_WORTH = "root on this host"


def in_one_line(process: Outcome | None, docker: Outcome | None, pool: range, socket: Result) -> str:
    """Sum up what workers of each backend are isolated by.

    `pool` are the uids of which each is one worker's, `socket` is what was found about the engine's socket.
    """
    kinds = (("Apps in bubblewrap", process), ("Apps in Docker", docker))
    found = [f"{who}: {_told(outcome, pool)}." for who, outcome in kinds if outcome is not None]
    return " ".join([*found, *_trusted(socket)])


def _told(outcome: Outcome, pool: range) -> str:
    if isinstance(outcome, ProbeFailed):
        return "not known, since the probe did not run"
    found = list(_facets(outcome, pool))
    return "; ".join(
        f"{words} by {_listed([facet for facet, holds in found if holds is wanted])}"
        for words, wanted in (("isolated", True), ("not isolated", False))
        if any(holds is wanted for _, holds in found)
    )


def _facets(report: Report, pool: range) -> Iterator[tuple[str, bool]]:
    yield "uid", report.peer.uid == report.uid and report.uid in pool
    yield "processes", report.peer.pid != report.inner_pid  # the same one, seen from outside and from inside
    sockets = [sight for target, sight in report.sights.items() if target.at.path]
    yield "files", bool(sockets) and all(sight.failure == _NOT_THERE for sight in sockets)
    yield "system calls", report.filtered
    for controller, words in _LIMITS.items():
        yield words, controller in report.controllers
    yield "network", report.abstract.failure == _NOBODY_LISTENS
    yield "abstract sockets", not report.abstract.reached
    reached = [target for target, sight in report.sights.items() if sight.reached and not target.abstract]
    yield "this host's services", not [target for target in reached if target not in METADATA]
    yield "the cloud's credentials", not [target for target in reached if target in METADATA]


def _trusted(socket: Result) -> Iterator[str]:
    """Say who could do anything on this host, where somebody has the engine's socket."""
    if _WORTH in socket.fact:
        who = "The API" if socket.severity is Severity.ERROR else "The Docker helper"
        yield f"{who} has the container engine's socket, which is {_WORTH}."


def _listed(words: Sequence[str]) -> str:
    *others, last = words
    return f"{', '.join(others)} and {last}" if others else last
