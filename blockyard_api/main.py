"""Entry point of `blockyard-api`: serve, or make tokens."""

import argparse
import logging
import os
import resource
import sys
from pathlib import Path

import prctl
import uvloop

from blockyard_api import settings
from blockyard_api.errors import BlockyardError, NotStarted
from blockyard_api.identity.tokens import Tokens
from blockyard_api.settings import Settings
from blockyard_api.store import database, place
from blockyard_spawner.config import DEFAULT_PATH, ConfigError


def main() -> None:
    """Run the daemon, or one of its sub-commands; exit status 2 for a wrong configuration, 1 for any other failure."""
    arguments = _arguments()
    os.umask(0o077)  # the database is nobody else's, whoever started this
    prctl.set_dumpable(0)  # nor is the memory, in which tokens are: not even another process's of the same uid
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # and no crash writes it into a file
    try:
        configured = settings.load(arguments.config, os.environ)
        if arguments.command == "token":
            print(uvloop.run(_token(configured, bootstrap=arguments.bootstrap)))  # noqa: T201 - its whole purpose
        else:
            logging.basicConfig(level=configured.server.log_level.upper(), format="%(levelname)s %(name)s: %(message)s")
            logging.getLogger("aiosqlite").setLevel(logging.WARNING)
            from blockyard_api import serving  # noqa: PLC0415 - half a second, which a token need not wait for

            uvloop.run(serving.serve(configured))
    except ConfigError as error:
        sys.exit(_complain(str(error), 2))
    except NotStarted as error:
        # 2 is not tried again by systemd: what a person has to see to does not go away by itself
        sys.exit(_complain(error.message, 1 if error.passing else 2))
    except BlockyardError as error:
        sys.exit(_complain(error.message, 1))
    except OSError as error:
        sys.exit(_complain(f"{error.strerror}: {error.filename}" if error.filename else str(error), 1))


def _complain(sentence: str, status: int) -> int:
    print(f"blockyard-api: {sentence}", file=sys.stderr)  # noqa: T201 - the journal, or a person, reads it
    return status


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="blockyard-api", description="The unprivileged daemon: control plane and relay."
    )
    parser.add_argument("--config", default=DEFAULT_PATH, metavar="FILE", help="configuration (default: %(default)s)")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser("serve", help="serve (the default)")
    token = commands.add_parser("token", help="make the first access token, once")
    which = token.add_mutually_exclusive_group(required=True)
    which.add_argument("--init", action="store_true", help="write an administrator's token to STATE_DIR/admin-token")
    which.add_argument("--bootstrap", action="store_true", help="print a one-time token for POST /api/v1/bootstrap")
    return parser.parse_args()


async def _token(configured: Settings, *, bootstrap: bool) -> str:
    state_dir = Path(configured.storage.state_dir)
    place.prepare_state(state_dir)
    async with database.opened(place.database_path(configured)) as store:
        tokens = Tokens(store)
        if bootstrap:
            return await tokens.offer_bootstrap()
        path = state_dir / "admin-token"
        plain = await tokens.first_admin()
    if plain is not None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(plain + "\n")
    return str(path)


if __name__ == "__main__":
    main()
