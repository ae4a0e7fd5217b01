"""Which server, and as whom: from the command line, the environment, or ~/.config/by/config.json (mode 0600)."""

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from blockyard_api.cli.client import Failure, UsedWrongly

DEFAULT_SERVER = "http://127.0.0.1:8080"


@dataclass(frozen=True, slots=True)
class Credentials:
    """A server's address without a final slash, and a token for it; without one, the server that a login is for."""

    server: str
    token: str | None
    elsewhere: str | None = None


def resolve(server: str | None, token: str | None, environ: Mapping[str, str]) -> Credentials:
    """Combine the given options with BLOCKYARD_URL, BLOCKYARD_TOKEN and the stored login, in this order.

    A stored token is used for the server it was stored for and no other. An empty variable is as good as none. Raises
    Failure.
    """
    stored = load()
    chosen = _address(server or environ.get("BLOCKYARD_URL") or (stored.server if stored else DEFAULT_SERVER))
    given = token or environ.get("BLOCKYARD_TOKEN") or None
    if given is None and stored:
        if stored.server != chosen:
            return Credentials(chosen, None, elsewhere=stored.server)
        given = stored.token
    if given is not None and not (given.isascii() and given.isprintable() and " " not in given):
        raise UsedWrongly("invalid_token", "A token is one word of plain characters; copy it again.")
    return Credentials(chosen, given)


def load() -> Credentials | None:
    """Return the stored login, or None. Raises Failure for a file that cannot be read."""
    path = _path()
    if path is None:
        return None
    try:
        content = json.loads(path.read_text())
        return Credentials(_address(content["server"]), str(content["token"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise Failure("unreadable_login", f"{path} cannot be read; remove it and run 'by login' again.") from error


def save(credentials: Credentials) -> Path:
    """Store a login, whole or not at all, readable by its owner only. Raises Failure."""
    path = _path()
    if path is None:
        raise Failure(
            "no_home", "There is no home directory to keep the login in; set BLOCKYARD_URL and BLOCKYARD_TOKEN."
        )
    content = json.dumps({"server": credentials.server, "token": credentials.token}, indent=2) + "\n"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, unfinished = tempfile.mkstemp(dir=path.parent, prefix=".config-")  # mode 0600
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(content)
            Path(unfinished).replace(path)
        except BaseException:
            Path(unfinished).unlink(missing_ok=True)
            raise
    except OSError as error:
        reason = f"{path} cannot be written ({error.strerror})"
        raise Failure("login_not_kept", f"{reason}; set BLOCKYARD_URL and BLOCKYARD_TOKEN instead.") from error
    return path


def forget() -> bool:
    """Remove the stored login; tell whether there was one."""
    path = _path()
    try:
        if path is not None:
            path.unlink()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise Failure("login_kept", f"{path} cannot be removed ({error.strerror}); remove it by hand.") from error
    return path is not None


def _path() -> Path | None:
    try:
        return Path.home() / ".config" / "by" / "config.json"
    except RuntimeError:  # neither $HOME nor an entry in the user database
        return None


def _address(server: str) -> str:
    try:
        parts = urlsplit(server)
        valid = parts.scheme in {"http", "https"} and parts.hostname and (parts.port is None or parts.port > 0)
        httpx.URL(server).raw_host.decode("ascii").encode("idna")  # as its address is looked up: labels have 63 at most
    except (ValueError, httpx.InvalidURL):
        valid = False
    if not valid or parts.username is not None or parts.query or parts.fragment:
        raise UsedWrongly("invalid_server", f"{server!r:.200} is no server's address; write it like {DEFAULT_SERVER}.")
    return server.rstrip("/")
