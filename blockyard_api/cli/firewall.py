"""`by admin firewall`: print what keeps workers from this machine's services. It asks no server and changes nothing."""

import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

from blockyard_api import settings
from blockyard_api.cli.client import Failure, UsedWrongly
from blockyard_api.errors import BlockyardError
from blockyard_api.hardening import surroundings
from blockyard_api.hardening.firewall import Format, loaded_by, render
from blockyard_spawner.config import DEFAULT_PATH, ConfigError


def firewall(
    context: typer.Context,
    form: Annotated[
        Format, typer.Option("--format", help="Whose words, and whether a worker is known by uid or by cgroup.")
    ] = Format.NFT,
    *,
    apply_with: Annotated[
        bool, typer.Option("--apply-with", help="Print the commands that load the rules, for root's shell.")
    ] = False,
    config: Annotated[
        Path | None, typer.Option(help=f"The server's configuration, {DEFAULT_PATH} unless it is another.")
    ] = None,
) -> None:
    """Print rules that keep apps from this machine's services.

    Run it on the server. Each rule names a destination and says why: the cloud's metadata, loopback, this machine's
    addresses, Redis, vault, the database. The resolver and the open internet stay reachable. It changes nothing itself;
    'by admin firewall --apply-with | sudo sh' loads the rules, and may be repeated.
    """
    printed = f"by admin firewall --format {form}"
    if config is not None:
        if not config.exists():  # the usual one may be absent: then all keys have their defaults
            raise UsedWrongly("no_such_path", f"There is no '{config}'; give the server's configuration to --config.")
        printed += f" --config {shlex.quote(str(config.absolute()))}"
    output = context.obj.output
    commands = loaded_by(form, printed)
    if apply_with and not output.as_json:
        output.result(commands, "\n".join(commands))  # what is wrong with the rules, they say themselves when they run
        return
    try:
        around = surroundings.look(settings.load(str(config or DEFAULT_PATH), os.environ))
        rules = render(around, form)
    except ConfigError as error:
        raise Failure("invalid_configuration", str(error)) from error
    except BlockyardError as error:
        raise Failure(error.code, error.message) from error
    warnings = [
        f"{service.key}: {service.host} has no address now, so workers are not kept from it; try later."
        for service in around.services
        if not service.addresses
    ]
    for warning in warnings:
        output.note(warning)
    record = {"format": form, "rules": rules, "apply_with": commands, "warnings": warnings}
    output.result(record, rules.rstrip("\n"))
