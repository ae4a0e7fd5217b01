"""`by admin install-apparmor`: a command for the server itself, which asks no API."""

from pathlib import Path
from typing import Annotated

import typer

from blockyard_api.cli.client import Failure
from blockyard_api.cli.output import STANDARD_OUTPUT, Output
from blockyard_api.hardening import apparmor


def install_apparmor(
    context: typer.Context,
    target: Annotated[Path, typer.Option(help="Where to write the profile; '-' prints it.")] = apparmor.TARGET,
) -> None:
    """Let workers make their sandbox where AppArmor denies bwrap user namespaces.

    Run as root on the server. Writes a profile that confines nothing, and loads it.
    """
    output: Output = context.obj.output
    if target == STANDARD_OUTPUT:
        output.content(apparmor.POLICY.read_bytes())
        return
    try:
        done = apparmor.install(target)
    except OSError as error:
        raise Failure("cannot_write", f"{target} cannot be written ({error.strerror}); run this as root.") from error
    for warning in done.warnings:
        output.note(f"Warning: {warning}")
    written = f"{target} is {'written' if done.changed else 'as it should be'}"
    following = " and loaded; for workers from now on: systemctl restart blockyard-spawner" if done.loaded else ""
    output.result(
        {"target": str(target), "changed": done.changed, "loaded": done.loaded, "warnings": list(done.warnings)},
        f"{written}{following}.",
    )
