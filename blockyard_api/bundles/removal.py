"""Removes directories, whatever a taken-over unpacking made of them: closed to everybody, or nested without end.

Each path stays short and nothing recurses: what lies deeper first moves up. Nobody may change the directory meanwhile.
"""

import contextlib
import logging
import os
import secrets
from pathlib import Path

log = logging.getLogger(__name__)


def discard(directory: Path) -> None:
    """Remove a directory with all that is in it, if it is there; tell in the log what stays."""
    try:
        with contextlib.suppress(FileNotFoundError):
            remove(directory)
    except OSError as error:
        log.warning("%s is needed no more and cannot be removed: %s", directory, error)


def remove(directory: Path) -> None:
    """Remove a directory with all that is in it. Raises OSError for what stays, once everything else is gone."""
    directory.chmod(0o700)
    gone, failure = 1, None
    while gone:
        gone, failure = _sweep(directory, directory)
    if failure:
        raise failure
    directory.rmdir()


def _sweep(directory: Path, top: Path) -> tuple[int, OSError | None]:
    """Remove what a directory holds, or move it up to `top`; return how much that was, and why something stays."""
    gone = 0
    failure = None
    with os.scandir(directory) as entries:
        for entry in entries:
            path = Path(entry.path)
            try:
                if not entry.is_dir(follow_symlinks=False):
                    path.unlink()
                elif directory != top:
                    path.chmod(0o700)  # a directory that is moved is written to
                    path.rename(top / secrets.token_hex(16))
                else:
                    path.chmod(0o700)
                    below, reason = _sweep(path, top)
                    gone += below
                    failure = failure or reason
                    path.rmdir()
                gone += 1
            except OSError as error:
                failure = failure or error
    return gone, failure
