"""What every command is given, and what most of them take."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated

import typer

from blockyard_api.apps import naming
from blockyard_api.cli import credentials
from blockyard_api.cli.client import Client, Failure, UsedWrongly
from blockyard_api.cli.output import Output

_WHOLE_ID = 32  # characters; what is shorter begins an id
_FEWEST = 4


@dataclass(frozen=True, slots=True)
class Invocation:
    """How to print, and which server was named."""

    output: Output
    server: str | None
    token: str | None

    @contextmanager
    def client(self) -> Iterator[Client]:
        """Connect with whatever login there is."""
        login = credentials.resolve(self.server, self.token, os.environ)
        with Client(login.server, login.token, login.elsewhere) as client:
            yield client


def invocation(context: typer.Context) -> Invocation:
    """Return what the options before the command said."""
    found = context.find_object(Invocation)
    if found is None:
        raise Failure("internal_error", "The command was started without its options; report this.")
    return found


def reference(given: str | None) -> str | None:
    """Return what may be an app's name or id. Raises UsedWrongly."""
    if given is not None and not (naming.NAME.fullmatch(given) or naming.ID.fullmatch(given)):
        raise UsedWrongly("invalid_name", f"{naming.RULE.removesuffix('.')}; '{given}' is none, nor is it an app's id.")
    return given


def whole_id(given: str, known: Iterable[str], what: str, listing: str) -> str:
    """Return the id that begins like this, as tables on a terminal show it. Raises Failure."""
    if len(given) >= _WHOLE_ID:
        return given
    if len(given) < _FEWEST:
        raise UsedWrongly("id_too_short", f"Give at least {_FEWEST} characters of the {what}'s id; '{listing}' has it.")
    found = [one for one in known if one.startswith(given)]
    if len(found) > 1:
        raise Failure("ambiguous_id", f"{len(found)} {what}s have ids that begin with '{given}'; give more of it.")
    if not found:
        raise Failure("not_found", f"There is no {what} whose id begins with '{given}'; '{listing}' names them.")
    return found[0]


AppName = Annotated[str, typer.Argument(metavar="APP", help="The app's name or id.", callback=reference)]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
