"""What a check is given."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from blockyard_api.apps.catalog import App
from blockyard_api.backends.spawner import Spawner
from blockyard_api.checks.probe import ProbeFailed, Report
from blockyard_api.settings import Settings

Outcome = Report | ProbeFailed


@dataclass(frozen=True, slots=True)
class Context:
    """The server as it is configured and running."""

    settings: Settings
    spawner: Spawner
    docker: Spawner  # the Docker helper
    apps: Callable[[], Iterable[App]]
    listening: tuple[tuple[str, int], ...]  # addresses of the API and of the relay, in this order


@dataclass(frozen=True, slots=True)
class Seen:
    """What probes told: of a worker as configured, and of one on the host's network (often the same one)."""

    worker: Outcome
    on_host: Outcome
    unlisted: str = ""  # why listening ports are not among the targets, if they are not
    left_out: int = 0  # listening ports too many to be tried
