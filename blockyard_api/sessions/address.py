"""Where apps live: from a request to an app's name and the path the app sees, and back. Pure.

The raw path is never decoded or cleaned: what decides about access is byte for byte what routes.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Place:
    """What a request is for; `rest` is None where the final slash of the app's address is missing."""

    app: str
    rest: bytes | None


@dataclass(frozen=True, slots=True)
class Addresses:
    """The scheme by which visitors reach apps, from ``proxy.public_url``."""

    origin: str  # with {app} where each app has its own
    before: str  # of the host, when each app has its own; else of the path
    after: str
    own_host: bool

    @classmethod
    def parse(cls, public_url: str) -> "Addresses":
        """Take ``https://{app}.apps.example.com/`` or ``http://host/app/{app}/`` apart."""
        scheme, _, rest = public_url.partition("://")
        host, _, path = rest.partition("/")
        if "{app}" in host:
            before, after = _without_port(host.lower()).split("{app}")
            return cls(f"{scheme}://{host}", before, after, own_host=True)
        before, after = f"/{path}".split("{app}")
        return cls(f"{scheme}://{host}", before, after, own_host=False)

    def find(self, host: bytes, target: bytes) -> Place | None:
        """Return what a request with this Host and raw target is for; None if it is for no app."""
        if self.own_host:
            name = _without_port(host.decode("latin-1").lower())
            if not name.startswith(self.before) or not name.endswith(self.after):
                return None
            return Place(name[len(self.before) : len(name) - len(self.after)], target)
        before = self.before.encode()
        if not target.startswith(before):
            return None
        path, mark, query = target[len(before) :].partition(b"?")
        segment, slash, rest = path.partition(b"/")
        return Place(segment.decode("latin-1"), b"/" + rest + mark + query if slash else None)

    def prefix(self, app: str) -> str:
        """Return the part of the path that the app does not see, without its final slash."""
        return "" if self.own_host else f"{self.before}{app}"

    def url(self, app: str) -> str:
        """Return where visitors find an app."""
        return f"{self.origin.replace('{app}', app)}{self.prefix(app)}/"

    def same_origin(self, app: str, origin: bytes, host: bytes, *, secure: bool) -> bool:
        """Whether an Origin header names the very origin on which this app is served.

        A browser cannot be made to send another Host than the one it connects to, so that one counts too: the server
        may have more names than the configuration knows.
        """
        written = origin.decode("latin-1").lower()
        own = f"{'https' if secure else 'http'}://{host.decode('latin-1').lower()}"
        return written in (own, self.origin.replace("{app}", app).lower())


def _without_port(host: str) -> str:
    return re.sub(r":[0-9]*$", "", host)
