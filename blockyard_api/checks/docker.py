"""What stands behind the Docker backend: who has the engine's socket, and whether it has the runtimes it should."""

import asyncio
import os
from collections.abc import Mapping

from blockyard_api.backends.spawner import SpawnerRefused, SpawnerUnreachable
from blockyard_api.checks.context import Context
from blockyard_api.checks.result import Result, error, info, ok

ADVICE = "See what 'docker_socket' says, and the journal of blockyard-spawner-docker."  # where a probe did not run
_UNUSED = "No app uses the Docker backend."
_PASSING = ("spawner_unreachable", "docker_unreachable", "docker_slow")  # as while both are being started
_UNKNOWN_RUNTIME = "docker_runtime"  # the helper's refusal of everything until that is put right


async def docker_socket(context: Context) -> Result:
    """Tell who may use the engine's socket: that is root on this host."""
    path = context.settings.docker.socket
    theirs = await asyncio.to_thread(os.access, path, os.W_OK)
    if not context.uses("docker"):
        return judged_socket(path, api_may_use_it=True, refusal=None) if theirs else ok("docker_socket", _UNUSED)
    return judged_socket(path, api_may_use_it=theirs, refusal=await _refusal(context))


async def docker_runtime(context: Context) -> Result:
    """Tell which runtimes containers run in, and whether the engine has them."""
    if not context.uses("docker"):
        return ok("docker_runtime", _UNUSED)
    docker = context.settings.docker
    return judged_runtime(await _refusal(context), docker.runtime, docker.runtime_defaults)


def judged_socket(path: str, *, api_may_use_it: bool, refusal: tuple[str, str] | None) -> Result:
    """Judge who has the engine's socket; `refusal` is why the helper does not answer, None if it does. Pure."""
    name = "docker_socket"
    if api_may_use_it:
        fact = f"The API may use {path}, and access to this socket is root on this host."
        return error(name, fact, "Take the user blockyard out of the socket's group; only the Docker helper needs it.")
    if refusal is not None and refusal[0] != _UNKNOWN_RUNTIME:
        fact = f"The Docker helper does not answer: {refusal[1].rstrip('.')}."
        remedy = "Run 'systemctl enable --now blockyard-spawner-docker.socket', or use no Docker backend."
        return error(name, fact, remedy, passing=refusal[0] in _PASSING)
    price = "access to this socket is root on this host, so the helper is part of what you trust"
    return info(name, f"The Docker helper uses {path}: {price}; the API cannot use it.")


def judged_runtime(refusal: tuple[str, str] | None, default: str, by_access: Mapping[str, str]) -> Result:
    """Judge the runtimes; `refusal` is why the helper does not answer, None if it does. Pure."""
    name = "docker_runtime"
    if refusal is not None and refusal[0] == _UNKNOWN_RUNTIME:
        return error(name, refusal[1], "Correct docker.runtime or docker.runtime_defaults, or install the runtime.")
    named = [f"{access} apps in {runtime}" for access, runtime in sorted(by_access.items())]
    others = f"others in {default}" if default else "others in the engine's default"
    return ok(name, f"Docker workers run in the runtime that root chose: {', '.join([*named, others])}.")


async def _refusal(context: Context) -> tuple[str, str] | None:
    """Return why the helper does not answer, as code and sentence; None if it does."""
    try:
        await context.docker.list()
    except (SpawnerRefused, SpawnerUnreachable) as failure:
        return failure.code, failure.message
    return None
