"""`by admin install-seccomp`: compile the workers' system call filter and put it where the spawner reads it."""

from pathlib import Path
from typing import Annotated

import typer

from blockyard_api.cli.client import Failure
from blockyard_api.errors import BlockyardError
from blockyard_api.hardening import seccomp
from blockyard_api.hardening.placing import put
from blockyard_spawner.config import KEYS

TARGET = Path(KEYS["process.seccomp_profile"].default)


def install(
    context: typer.Context,
    target: Annotated[Path, typer.Option(metavar="PATH", help="Where to put it.")] = TARGET,
    architecture: Annotated[
        str | None, typer.Option("--arch", help="Another machine's: x86_64 or aarch64; it is not tried out then.")
    ] = None,
) -> None:
    """Compile the workers' system call filter on this machine.

    The spawner reads it when it starts: restart it after a change.
    """
    chosen = architecture or seccomp.native()
    try:
        program = seccomp.compiled(seccomp.read_policy(), chosen)
        if tried := chosen == seccomp.native():
            seccomp.try_out(program)
    except BlockyardError as error:
        raise Failure(error.code, error.message) from error
    try:
        changed = put(target, program)
    except OSError as error:
        raise Failure("cannot_write", f"Cannot write {target} ({error.strerror}); run this as root.") from error
    told = f"{target}: {len(program) // 8} instructions for {chosen}{', tried out' if tried else ''}"
    words = "restart blockyard-spawner to use it" if changed else "unchanged"
    record = {"target": str(target), "architecture": chosen, "changed": changed, "tried": tried, "bytes": len(program)}
    context.find_root().obj.output.result(record, f"{told}; {words}.")
