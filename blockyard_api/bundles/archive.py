"""Turns an uploaded archive into a bundle's directory, whole or not at all, without parsing a byte of it here."""

import asyncio
import json
import os
import sys
import tempfile
from pathlib import Path

from blockyard_api.bundles.removal import discard, remove
from blockyard_api.bundles.unpack import ENTRY_POINTS, BundleInfo, BundleRefused, Unpacked, storage_failure
from blockyard_api.host import child

__all__ = ["BundleInfo", "BundleRefused", "unpack"]

TIME_LIMIT = 300.0  # seconds; 2 GB take about 20
MAX_VERDICT = 65536
UNPACK_FAILED = "unpack_failed", "The server failed to read the bundle; ask its operator to look at its log."
TOO_COMPLEX = "too_complex", "The archive takes too much to unpack; leave out what the app can do without."


async def unpack(archive: Path, destination: Path) -> BundleInfo:
    """Unpack `archive` so that `destination`, which must not exist, appears complete and durable, or not at all.

    A directory beside the destination is used meanwhile. Raises BundleRefused.
    """
    staging = destination.with_name(f".{destination.name}.staging")
    try:
        await asyncio.to_thread(_make_empty, staging)
        verdict = await _run(archive, staging)
        _publish(staging / verdict.top, destination)
        await asyncio.to_thread(_make_durable, destination.parent)
    except OSError as error:
        raise storage_failure(error) from error
    finally:
        await asyncio.shield(asyncio.to_thread(discard, staging))
    return verdict.info


def _make_empty(directory: Path) -> None:
    try:
        directory.mkdir(mode=0o755)
    except FileExistsError:  # left by an unpacking that a power cut ended
        remove(directory)
        directory.mkdir(mode=0o755)


def _publish(tree: Path, destination: Path) -> None:
    # Not a link, whose target would change its mode: whoever took over the unpacking made it.
    descriptor = os.open(tree, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        os.fchmod(descriptor, 0o755)  # whatever the umask was: workers read it as their own uid
    finally:
        os.close(descriptor)
    tree.rename(destination)  # not in a thread: cancelled, that would go on beside the removal of what it moves


def _make_durable(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


async def _run(archive: Path, staging: Path) -> Unpacked:
    argv = [sys.executable, "-I", "-m", "blockyard_api.bundles.unpack", str(archive), str(staging)]
    with tempfile.TemporaryFile() as output:  # not a pipe: the program's limit on files holds for it, too
        async with child.running(
            *argv, stdin=asyncio.subprocess.DEVNULL, stdout=output, env={"LANG": "C.UTF-8"}, start_new_session=True
        ) as process:
            try:
                async with asyncio.timeout(TIME_LIMIT):
                    status = await process.wait()
            except TimeoutError as error:
                raise BundleRefused(*TOO_COMPLEX) from error
        output.seek(0)
        text = output.read(MAX_VERDICT)
    if status < 0:  # killed by one of its limits, or by the kernel for want of memory
        raise BundleRefused(*TOO_COMPLEX)
    if status:  # its traceback went where ours would go
        raise BundleRefused(*UNPACK_FAILED)
    return _understood(text)


def _understood(text: bytes) -> Unpacked:
    """Read the verdict, which may be anything: whoever took over the unpacking wrote it. Raises BundleRefused."""
    try:
        verdict = json.loads(text)
        json.dumps(verdict, ensure_ascii=False).encode()  # half a surrogate pair fits into no log and no database
        match verdict:
            case {"refused": {"code": str(code), "message": str(message)}} if f"{code}{message}".isprintable():
                raise BundleRefused(code, message)
            case {"top": str(top), "info": {"entry": str(entry), "files": int(files), "size": int(size)}} if (
                ("/" not in top and "\0" not in top and top not in (".", ".."))  # it stays in its directory
                and entry.lower() in ENTRY_POINTS  # it is told in a log, line by line
                and all(type(number) is int and number >= 0 for number in (files, size))
            ):
                return Unpacked(top, BundleInfo(entry, files, size))
            case _:
                raise BundleRefused(*UNPACK_FAILED)
    except (ValueError, RecursionError) as error:
        raise BundleRefused(*UNPACK_FAILED) from error
