"""The state directory and the configuration file: whose they are, who may read them, and whether there is room."""

import asyncio
import errno
import os
import re
import secrets
import stat
from pathlib import Path

from blockyard_api.checks.context import Context
from blockyard_api.checks.result import Result, error, ok, warning
from blockyard_api.settings import holds_password
from blockyard_spawner import config

_LEAST_FREE = 16 << 20  # bytes; the database alone wants some
_BUNDLES_FREE = 5  # largest bundles that should fit
_LEAST_INODES = 1000
_ADDRESSES = ("redis.url", "database.url", "vault.address")
_SECRET_NAME = re.compile(r".*(PASSWORD|PASSWD|SECRET|TOKEN|API_?KEY)")


async def state_dir(context: Context) -> Result:
    """Look at owner, mode and room, and move something as a deployment does."""
    return await asyncio.to_thread(_state_dir, context)


def _state_dir(context: Context) -> Result:
    name, storage = "state_dir", context.settings.storage
    directory = Path(storage.state_dir)
    for path in (directory, directory / "bundles", directory / "libraries", directory / "uploads", directory / "logs"):
        status = path.stat()
        if status.st_uid != os.geteuid():
            remedy = f"Run 'chown --recursive {os.geteuid()} {path}'."
            return error(name, f"{path} belongs to uid {status.st_uid}, not to this daemon's {os.geteuid()}.", remedy)
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            remedy = f"Run 'chmod go-w {path}'."
            return error(name, f"Others may write to {path}: they could change what workers run.", remedy)
    room = os.statvfs(directory)
    free = room.f_bavail * room.f_frsize
    inodes = room.f_favail if room.f_files else _LEAST_INODES
    if free < _LEAST_FREE or inodes < 10:
        remedy = "Make room: old bundles, logs, or a larger disk."
        return error(name, f"{directory} is full: {free >> 20} MB and {inodes} files are left.", remedy)
    try:
        _publish(directory / "bundles")
    except OSError as failure:
        across = " It is a file system of its own, in which" if failure.errno == errno.EXDEV else ""
        remedy = "See that it is writable, and in one piece: a bundle is unpacked beside its place and then renamed."
        return error(name, f"{directory}/bundles:{across} nothing can be published: {failure.strerror}.", remedy)
    return _less_good(name, directory, free, inodes, _BUNDLES_FREE * storage.max_bundle_size, context)


def _publish(bundles: Path) -> None:
    """Do what a deployment does last."""
    staging = bundles / f".check-{secrets.token_hex(8)}.staging"
    place = staging.with_suffix("")
    staging.mkdir(mode=0o700)
    try:
        staging.rename(place)
    except OSError:
        staging.rmdir()
        raise
    place.rmdir()


def _less_good(name: str, directory: Path, free: int, inodes: int, wanted: int, context: Context) -> Result:
    if free < wanted or inodes < _LEAST_INODES:
        fact = f"{directory} has {free >> 20} MB and {inodes} files left; {_BUNDLES_FREE} large bundles "
        fact += f"take {wanted >> 20} MB."
        return warning(name, fact, "Make room, or lower storage.max_bundle_size.")
    listed = [
        path for path in (directory, directory / "bundles") if path.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH)
    ]
    if listed:
        remedy = f"Run 'chmod go-r {listed[0]}': workers only pass through it."
        return warning(name, f"Others may list {listed[0]}, whose names are to be unguessable.", remedy)
    database = Path(context.settings.database.path or directory / "blockyard.db")
    if database.exists() and database.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        fact = f"Others may read {database}: it holds tokens' hashes and who visits what."
        return warning(name, fact, f"Run 'chmod go= {database}*', and start the API with umask 0077.")
    return ok(name, f"{directory} is this daemon's alone, with {free >> 20} MB free.")


async def config_secrets(context: Context) -> Result:
    """Look whether others may read the configuration while it holds a secret."""
    name, file = "config_secrets", Path(context.settings.file)
    try:
        mode = (await asyncio.to_thread(file.stat)).st_mode
        written = await asyncio.to_thread(config.read, str(file))
    except FileNotFoundError:
        return ok(name, f"There is no {file}.")
    held = [key for key in _ADDRESSES if holds_password(str(written.get(key, "")))]
    environment = written.get("server.worker_env")
    if isinstance(environment, dict):
        held += [f"server.worker_env.{key}" for key in environment if _SECRET_NAME.fullmatch(key)]
    if not held:
        return ok(name, f"{file} holds no secret.")
    if mode & stat.S_IROTH:
        remedy = f"Run 'chgrp blockyard {file}' and 'chmod 0640 {file}'."
        return warning(name, f"Everybody on this host may read {file}, with the secret in {', '.join(held)}.", remedy)
    return ok(name, f"{file} holds {', '.join(held)}, and not everybody may read it.")
