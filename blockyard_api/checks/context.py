"""What a check is given."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from blockyard_api.apps.catalog import App
from blockyard_api.backends.spawner import Spawner
from blockyard_api.checks.probe import ProbeFailed, Report
from blockyard_api.settings import Settings

Outcome = Report | ProbeFailed
UNUSED = "No app uses the process backend."


@dataclass(frozen=True, slots=True)
class Context:
    """The server as it is configured and running."""

    settings: Settings
    spawner: Spawner
    docker: Spawner  # the Docker helper
    apps: Callable[[], Iterable[App]]
    listening: tuple[tuple[str, int], ...]  # addresses of the API and of the relay, in this order

    def uses(self, backend: str) -> bool:
        """Tell whether an app runs in this backend, or would if there were one."""
        usual = self.settings.server.backend
        return usual == backend or any(app.backend == backend for app in self.apps())


@dataclass(frozen=True, slots=True)
class Seen:
    """What probes told: of a worker as configured, and of one on the host's network (often the same one).

    Of a backend that nothing uses, there is None.
    """

    worker: Outcome | None
    on_host: Outcome | None
    docker: Outcome | None = None  # a Docker worker
    unlisted: str = ""  # why listening ports are not among the targets, if they are not
    left_out: int = 0  # listening ports too many to be tried
