"""`by admin install-seccomp`: compile the workers' system call filter and put it where the spawner reads it.

With --outer: write the profile of a container that holds the whole installation.
"""

from pathlib import Path
from typing import Annotated

import typer

from blockyard_api.cli.client import Failure
from blockyard_api.cli.output import STANDARD_OUTPUT
from blockyard_api.errors import BlockyardError
from blockyard_api.hardening import bpf, seccomp
from blockyard_api.hardening.placing import put
from blockyard_spawner.config import KEYS

TARGET = Path(KEYS["process.seccomp_profile"].default)
OUTER = TARGET.with_name("seccomp.json")


def install(
    context: typer.Context,
    target: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help=f"Where to put it; {TARGET}, or {OUTER} for --outer. '-' prints it."),
    ] = None,
    architecture: Annotated[
        str | None, typer.Option("--arch", help="Another machine's: x86_64 or aarch64; it is not tried out then.")
    ] = None,
    *,
    outer: Annotated[
        bool,
        typer.Option("--outer", help="The profile for 'docker run --security-opt seccomp=PATH'."),
    ] = False,
) -> None:
    """Compile the workers' system call filter on this machine.

    The spawner reads it when it starts: restart it after a change. With --outer: write the profile for a container that
    holds all of Blockyard; the engine reads it when a container is made.
    """
    output = context.find_root().obj.output
    if outer:
        profile, target = seccomp.outer(seccomp.read_policy(), seccomp.read_outer()), target or OUTER
        if target == STANDARD_OUTPUT:
            output.content(profile)
            return
        changed = _written(target, profile)
        words = f"give it to 'docker run --security-opt seccomp={target}'" if changed else "unchanged"
        output.result({"target": str(target), "changed": changed, "bytes": len(profile)}, f"{target}; {words}.")
        return
    chosen, target = architecture or bpf.native(), target or TARGET
    try:
        program = seccomp.compiled(seccomp.read_policy(), chosen)
        if tried := chosen == bpf.native():
            seccomp.try_out(program)
    except BlockyardError as error:
        raise Failure(error.code, error.message) from error
    if target == STANDARD_OUTPUT:
        output.content(program)
        return
    changed = _written(target, program)
    told = f"{target}: {len(program) // bpf.INSTRUCTION.size} instructions for {chosen}{', tried out' if tried else ''}"
    words = "restart blockyard-spawner to use it"
    if target != TARGET:
        words = "for the spawner to use it, name it as process.seccomp_profile and restart blockyard-spawner"
    if not changed:
        words = "unchanged"
    record = {"target": str(target), "architecture": chosen, "changed": changed, "tried": tried, "bytes": len(program)}
    output.result(record, f"{told}; {words}.")


def _written(target: Path, content: bytes) -> bool:
    try:
        return put(target, content)
    except OSError as error:
        raise Failure("cannot_write", f"Cannot write {target} ({error.strerror}); run this as root.") from error
