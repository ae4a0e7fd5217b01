"""Packs an app's directory into the archive that the server takes: reproducible, without what no server needs."""

import fnmatch
import gzip
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from blockyard_api.cli.client import Failure

IGNORE_FILE = ".byignore"
# Version control, editors' and R's own leftovers, and package libraries, which belong to the machine they were made on.
IGNORED = (
    ".git", ".svn", ".hg", ".DS_Store", "._*", "__pycache__", ".Rproj.user", ".Rhistory", ".RData", ".Ruserdata",
    "rsconnect", "node_modules", ".venv", "renv/library", "renv/staging", "renv/sandbox", "renv/python", "renv/local",
    "packrat/lib*", "packrat/src", IGNORE_FILE,
)  # fmt: skip


def pack(directory: Path, archive: IO[bytes]) -> int:
    """Write the directory as .tar.gz and return the number of files. Raises Failure.

    The app is at its top, or in the one directory that it holds. Lines of a .byignore in either are further patterns: a
    name to leave out wherever it is, or a path from either.
    """
    at_the_top = _has_entry_point(directory)
    ignored = (*IGNORED, *_own_patterns(directory))
    top = directory if at_the_top else _directory_below(directory, ignored)
    if top != directory:
        ignored += (*_own_patterns(top),)
    count = 0
    try:
        with (
            gzip.GzipFile(filename="", mode="wb", fileobj=archive, mtime=0) as stream,
            tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as members,
        ):
            for path in _walk(directory, {directory, top}, ignored):
                members.add(path, path.relative_to(directory).as_posix(), recursive=False, filter=_anonymous)
                count += not path.is_dir()
    except OSError as error:
        raise Failure("unreadable", f"{error.filename or directory} cannot be packed ({error.strerror}).") from error
    return count


def _has_entry_point(directory: Path) -> bool:
    try:
        names = {path.name.lower() for path in directory.iterdir()}
    except OSError as error:
        raise Failure(
            "unreadable", f"{directory} cannot be read ({error.strerror}); name an app's directory."
        ) from error
    return "app.r" in names or {"server.r", "ui.r"} <= names


def _directory_below(directory: Path, ignored: tuple[str, ...]) -> Path:
    """Return the one directory that holds the app, as the server finds it: what is left out is not there."""
    match list(_entries(directory, {directory}, ignored)):
        case [only] if only.is_dir() and not only.is_symlink() and _has_entry_point(only):
            return only
    where = "at its top or in the one directory that it holds"
    raise Failure(
        "no_entry_point", f"{directory} has neither app.R nor server.R and ui.R {where}; name an app's directory."
    )


def _own_patterns(directory: Path) -> list[str]:
    try:
        lines = (directory / IGNORE_FILE).read_text().splitlines()
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise Failure("unreadable", f"{directory / IGNORE_FILE} cannot be read; correct or remove it.") from error
    return [line.strip().strip("/") for line in lines if line.strip() and not line.startswith("#")]


def _walk(directory: Path, roots: set[Path], ignored: tuple[str, ...]) -> Iterator[Path]:
    for path in _entries(directory, roots, ignored):
        yield path
        if path.is_dir() and not path.is_symlink():
            yield from _walk(path, roots, ignored)


def _entries(directory: Path, roots: set[Path], ignored: tuple[str, ...]) -> Iterator[Path]:
    for path in sorted(directory.iterdir()):
        names = [path.name, *(path.relative_to(root).as_posix() for root in roots if path.is_relative_to(root))]
        if not any(fnmatch.fnmatchcase(name, mask) for name in names for mask in ignored):
            yield path


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Leave out who packed, and when files were touched: the same app gives the same bytes."""
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    return member
