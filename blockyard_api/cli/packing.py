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

    Lines of a .byignore at its top are further patterns: a name to leave out wherever it is, or a path.
    """
    _require_entry_point(directory)
    ignored = (*IGNORED, *_own_patterns(directory))
    count = 0
    try:
        with (
            gzip.GzipFile(filename="", mode="wb", fileobj=archive, mtime=0) as stream,
            tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as members,
        ):
            for path in _walk(directory, directory, ignored):
                members.add(path, path.relative_to(directory).as_posix(), recursive=False, filter=_anonymous)
                count += not path.is_dir()
    except OSError as error:
        raise Failure("unreadable", f"{error.filename or directory} cannot be packed ({error.strerror}).") from error
    return count


def _require_entry_point(directory: Path) -> None:
    try:
        names = {path.name.lower() for path in directory.iterdir()}
    except OSError as error:
        raise Failure(
            "unreadable", f"{directory} cannot be read ({error.strerror}); name an app's directory."
        ) from error
    if "app.r" not in names and not {"server.r", "ui.r"} <= names:
        raise Failure(
            "no_entry_point", f"{directory} has neither app.R nor server.R and ui.R; name an app's directory."
        )


def _own_patterns(directory: Path) -> list[str]:
    try:
        lines = (directory / IGNORE_FILE).read_text().splitlines()
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise Failure("unreadable", f"{directory / IGNORE_FILE} cannot be read; correct or remove it.") from error
    return [line.strip().strip("/") for line in lines if line.strip() and not line.startswith("#")]


def _walk(root: Path, directory: Path, ignored: tuple[str, ...]) -> Iterator[Path]:
    for path in sorted(directory.iterdir()):
        relative = path.relative_to(root).as_posix()
        if any(fnmatch.fnmatchcase(path.name, mask) or fnmatch.fnmatchcase(relative, mask) for mask in ignored):
            continue
        yield path
        if path.is_dir() and not path.is_symlink():
            yield from _walk(root, path, ignored)


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Leave out who packed, and when files were touched: the same app gives the same bytes."""
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    return member
