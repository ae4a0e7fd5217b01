"""What stands behind the Docker backend: who has the engine's socket, and whether it has the runtimes it should."""

import asyncio
import os

from blockyard_api.backends import docker_checks
from blockyard_api.backends.spawner import SpawnerRefused, SpawnerUnreachable
from blockyard_api.checks.context import Context
from blockyard_api.checks.result import Result, Severity, ok

_UNUSED = "No app uses the Docker backend."


async def docker_socket(context: Context) -> Result:
    """Tell who may use the engine's socket: that is root on this host."""
    name, path = "docker_socket", context.settings.docker.socket
    theirs = await asyncio.to_thread(os.access, path, os.W_OK)
    if not _is_used(context) and not theirs:
        return ok(name, _UNUSED)
    refusal = await _refusal(context) if _is_used(context) else None
    answers = "ok" if refusal is None or refusal[0] == "docker_runtime" else refusal[1]
    return _result(name, docker_checks.socket(path, api_may_use_it=theirs, helper=answers))


async def docker_runtime(context: Context) -> Result:
    """Tell which runtimes containers run in, and whether the engine has them."""
    name, docker = "docker_runtime", context.settings.docker
    if not _is_used(context):
        return ok(name, _UNUSED)
    return _result(name, docker_checks.runtime(await _refusal(context), docker.runtime, dict(docker.runtime_defaults)))


def _is_used(context: Context) -> bool:
    usual = context.settings.server.backend
    return usual == "docker" or any(app.backend == "docker" for app in context.apps())


async def _refusal(context: Context) -> tuple[str, str] | None:
    """Return why the helper does not answer, as code and sentence; None if it does."""
    try:
        await context.docker.list()
    except (SpawnerRefused, SpawnerUnreachable) as failure:
        return failure.code, failure.message
    return None


def _result(name: str, finding: docker_checks.Finding) -> Result:
    return Result(name, Severity(finding.severity), finding.fact, finding.remedy)
