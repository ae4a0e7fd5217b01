"""The program that unpacks one untrusted archive: ``python -m blockyard_api.bundles.unpack ARCHIVE STAGING``.

It gives up what it can before it reads a byte, writes only below STAGING, which must be an empty directory and is all
that the kernel lets it open from then on, and prints one line of JSON: what it found, or why it refuses. Its caller
throws STAGING away unless the verdict is good.

tarfile parses; what may be written is decided here, not by tarfile's filters. Nothing is ever written through a
symbolic link, because no link exists before the last file is written, and none is made that does not resolve inside.
"""

import errno
import gzip
import json
import os
import re
import resource
import stat
import sys
import tarfile
import unicodedata
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

import prctl

from blockyard_api.bundles.confinement import reach_nobody, stay_below

MAX_FILES = 10_000
MAX_DIRECTORIES = 10_000
MAX_SIZE = 2 << 30
MAX_RATIO = 20
MAX_PATH = 1024  # well below PATH_MAX even with the directories above, so that no later path is cut off
MAX_DEPTH = 40
MAX_LINK_HOPS = 40
MAX_HEADERS = 1 << 20  # between the contents of two files, and after the last
MAX_SCANNED_CODE = 256 << 10
CHUNK = 1 << 18
ENTRY_POINTS = ("app.r", "server.r")  # however they are spelled

Parts = tuple[str, ...]


class BundleRefused(Exception):
    """A bundle that is not taken: a stable code, and one sentence for the deployer."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


@dataclass(frozen=True, slots=True)
class BundleInfo:
    """What was unpacked: the file Shiny starts from as it is spelled, files and links, and bytes."""

    entry: str
    files: int
    size: int


@dataclass(frozen=True, slots=True)
class Unpacked:
    """A good verdict: `top` is the one directory that everything lay below, or empty."""

    top: str
    info: BundleInfo


def storage_failure(error: OSError) -> BundleRefused:
    """Word a failure that is the server's and not the bundle's."""
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        message = "The server's disk is full; ask its operator to make room, then deploy again."
        return BundleRefused("disk_full", message)
    message = f"The server could not store the bundle ({error.strerror}); ask its operator to look at its log."
    return BundleRefused("storage_failed", message)


class _Meter:
    """The decompressed stream, which ends in a refusal where more is read than the next step may take."""

    def __init__(self, archive: IO[bytes]) -> None:
        self._stream = gzip.GzipFile(fileobj=archive)
        self._left = 0

    def allow(self, size: int) -> None:
        self._left = size

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise BundleRefused(
                "header_too_large", "The archive's headers are larger than any tar program makes them; pack it anew."
            )
        return data


@dataclass
class _Tree:
    """What has been taken so far. Kinds of entry: "file", "directory", "link"."""

    root: int  # descriptor of the staging directory
    budget: int
    entries: dict[Parts, str] = field(default_factory=dict)
    links: dict[Parts, str] = field(default_factory=dict)
    members: int = 0
    files: int = 0
    directories: int = 0
    size: int = 0


def extract(archive: IO[bytes], staging: int) -> Unpacked:
    """Unpack a gzipped tar archive below the directory descriptor `staging`. Raises BundleRefused, OSError."""
    compressed = os.fstat(archive.fileno()).st_size
    if not compressed:
        raise BundleRefused("not_gzip", "The archive is empty; pack the app with tar -czf.")
    meter = _Meter(archive)
    tree = _Tree(staging, budget=min(MAX_SIZE, MAX_RATIO * compressed))
    try:
        meter.allow(MAX_HEADERS)
        with tarfile.open(fileobj=meter, mode="r|", bufsize=CHUNK) as members:  # type: ignore[call-overload]  # a reader needs no write()
            while member := members.next():
                _take(tree, members, member, meter)
                meter.allow(MAX_HEADERS)
        while meter.read(CHUNK):  # the checksum is at the end
            pass
    except gzip.BadGzipFile as error:
        raise BundleRefused("not_gzip", "This is not a whole .tar.gz file; pack the app with tar -czf.") from error
    except (EOFError, zlib.error) as error:
        raise BundleRefused("truncated", "The archive is cut off or damaged; send it again.") from error
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        raise BundleRefused("not_tar", f"This is not a sound tar archive ({error!r:.100}); pack it anew.") from error
    return _finish(tree)


def _take(tree: _Tree, members: tarfile.TarFile, member: tarfile.TarInfo, meter: _Meter) -> None:
    path = _safe_path(member.name)
    shown = f"{member.name!r:.200}"
    tree.members += 1
    if tree.members > MAX_FILES + MAX_DIRECTORIES:  # directories may be named again and again
        raise BundleRefused(
            "too_many_files", "The archive has too many entries; leave out what the app can do without."
        )
    if member.isdir():
        _make_directories(tree, path)
        return
    if not path:
        raise BundleRefused("bad_name", f"The archive has an entry without a name ({shown}); pack it anew.")
    _make_directories(tree, path[:-1])
    if path in tree.entries:
        raise BundleRefused("duplicate_name", f"{shown} is in the archive twice; pack it anew.")
    tree.files += 1
    if tree.files > MAX_FILES:
        raise BundleRefused(
            "too_many_files", f"The bundle has more than {MAX_FILES} files; leave out what it can do without."
        )
    if member.issym():
        _link_text(member)
        tree.links[path] = member.linkname
        tree.entries[path] = "link"
    elif member.islnk():
        _take_hard_link(tree, path, member)
    elif member.isreg() and not member.issparse():
        _take_file(tree, path, members, member, meter)
    else:
        raise BundleRefused("special_file", f"{shown} is neither file, directory nor link; leave it out.")


def _safe_path(name: str) -> Parts:
    shown = f"{name!r:.200}"
    if name.startswith("/"):
        raise BundleRefused("absolute_path", f"{shown} is an absolute path; pack the app's directory from inside it.")
    path = tuple(part for part in name.split("/") if part not in {"", "."})
    if ".." in path:
        raise BundleRefused(
            "path_outside", f"{shown} leads out of the bundle; pack the app's directory from inside it."
        )
    # Cc: control characters; Cs: what was not UTF-8.
    if any(unicodedata.category(character) in {"Cc", "Cs"} for character in name):
        raise BundleRefused("bad_name", f"{shown} is not plain UTF-8 text; rename the file.")
    if len(name.encode()) > MAX_PATH or len(path) > MAX_DEPTH or any(len(part.encode()) > 255 for part in path):
        raise BundleRefused("name_too_long", f"{shown} is too long or too deep; give it a shorter path.")
    return path


def _link_text(member: tarfile.TarInfo) -> None:
    shown = f"The link {member.name!r:.200}"
    if not member.linkname or member.linkname.startswith("/"):
        raise BundleRefused("link_outside", f"{shown} leads out of the bundle; put the file itself there.")
    if len(os.fsencode(member.linkname)) > MAX_PATH or "\0" in member.linkname:
        raise BundleRefused("name_too_long", f"{shown} has too long a target; put the file itself there.")


def _open_directory(tree: _Tree, path: Parts) -> int:
    directory = os.dup(tree.root)
    for part in path:
        try:
            below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
        finally:
            os.close(directory)
        directory = below
    return directory


def _make_directories(tree: _Tree, path: Parts) -> None:
    for depth in range(1, len(path) + 1):
        known = tree.entries.get(path[:depth])
        if known == "directory":
            continue
        if known:
            name = "/".join(path[:depth])
            raise BundleRefused("duplicate_name", f"{name!r:.200} is both a file and a directory; pack it anew.")
        tree.directories += 1
        if tree.directories > MAX_DIRECTORIES:
            raise BundleRefused(
                "too_many_files", f"The bundle has more than {MAX_DIRECTORIES} directories; leave some out."
            )
        parent = _open_directory(tree, path[: depth - 1])
        try:
            os.mkdir(path[depth - 1], 0o755, dir_fd=parent)
        finally:
            os.close(parent)
        tree.entries[path[:depth]] = "directory"


def _take_file(tree: _Tree, path: Parts, members: tarfile.TarFile, member: tarfile.TarInfo, meter: _Meter) -> None:
    if member.size < 0:
        raise BundleRefused("not_tar", f"{member.name!r:.200} has a negative size; pack it anew.")
    tree.size += member.size
    if tree.size > tree.budget:  # before the first byte of it is written
        raise BundleRefused(
            "too_large", f"Unpacked, the bundle is larger than 2 GB or {MAX_RATIO} times its archive; leave data out."
        )
    source = members.extractfile(member)
    if source is None:
        raise BundleRefused("special_file", f"{member.name!r:.200} cannot be read as a file; leave it out.")
    meter.allow(member.size + MAX_HEADERS)
    parent = _open_directory(tree, path[:-1])
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(path[-1], flags, 0o644, dir_fd=parent)
    finally:
        os.close(parent)
    with os.fdopen(descriptor, "wb") as target:
        os.fchmod(descriptor, 0o755 if member.mode & stat.S_IXUSR else 0o644)
        left = member.size
        while left:
            data = source.read(min(CHUNK, left))
            if not data:
                raise EOFError
            target.write(data)
            left -= len(data)
    tree.entries[path] = "file"


def _take_hard_link(tree: _Tree, path: Parts, member: tarfile.TarInfo) -> None:
    _link_text(member)
    target = _safe_path(member.linkname)
    if tree.entries.get(target) != "file":
        raise BundleRefused(
            "link_outside", f"The link {member.name!r:.200} is to no earlier file of the bundle; pack it anew."
        )
    source_parent, parent = _open_directory(tree, target[:-1]), _open_directory(tree, path[:-1])
    try:
        os.link(target[-1], path[-1], src_dir_fd=source_parent, dst_dir_fd=parent, follow_symlinks=False)
    finally:
        os.close(source_parent)
        os.close(parent)
    tree.entries[path] = "file"


def _finish(tree: _Tree) -> Unpacked:
    """Find the top and the entry point, and make the links, now that everything they may lead to is known."""
    roots = {path[0] for path in tree.entries}
    top = roots.pop() if len(roots) == 1 else ""
    strip = 1 if tree.entries.get((top,)) == "directory" else 0
    top = top if strip else ""
    entries = {path[strip:]: kind for path, kind in tree.entries.items()} | {(): "directory"}
    links = {path[strip:]: target for path, target in tree.links.items()}
    resolved = {path: _resolve(path, entries, links) for path in links}
    entry = _entry_point({path[0]: entries[resolved.get(path, path)] for path in entries if len(path) == 1})
    if entry.lower() == "app.r":
        _refuse_own_server(tree, (top,) * strip + resolved.get((entry,), (entry,)))
    for path, target in tree.links.items():
        parent = _open_directory(tree, path[:-1])
        try:
            os.symlink(target, path[-1], dir_fd=parent)
        finally:
            os.close(parent)
    return Unpacked(top, BundleInfo(entry, tree.files, tree.size))


def _resolve(link: Parts, entries: Mapping[Parts, str], links: Mapping[Parts, str]) -> Parts:
    """Follow a link through the bundle's own entries, as the kernel would with the bundle as its whole world."""
    refusal = BundleRefused(
        "link_outside",
        f"The link {'/'.join(link)!r:.200} leads out of the bundle or nowhere; put the file itself there.",
    )
    here: Parts = link[:-1]
    ahead = links[link].split("/")
    hops = 1
    while ahead:
        part = ahead.pop(0)
        if entries.get(here) != "directory":
            raise refusal
        if part in {"", "."}:
            continue
        if part == "..":
            if not here:
                raise refusal
            here = here[:-1]
            continue
        step = (*here, part)
        if step in links:
            hops += 1
            if hops > MAX_LINK_HOPS:
                raise refusal
            ahead = links[step].split("/") + ahead
        elif step in entries:
            here = step
        else:
            raise refusal
    return here


def _entry_point(kinds: Mapping[str, str]) -> str:
    found: dict[str, list[str]] = {name: [] for name in (*ENTRY_POINTS, "ui.r")}
    for name, kind in kinds.items():
        if name.lower() in found and kind == "file":
            found[name.lower()].append(name)
    if twice := [names for names in found.values() if len(names) > 1]:
        raise BundleRefused("ambiguous_entry_point", f"The bundle has both {twice[0][0]} and {twice[0][1]}; keep one.")
    if found["server.r"] and found["ui.r"]:
        return found["server.r"][0]
    if found["app.r"]:
        return found["app.r"][0]
    raise BundleRefused("no_entry_point", "Put app.R, or server.R and ui.R, at the top of the bundle.")


# A string that is never closed runs to the end: looking for its close again and again would take quadratic time.
_TOKEN = re.compile(
    rb"""(?P<skip>\s+|\#[^\n]*|[rR](["'])(-*)[\[({].*?(?:[\])}]\3\2|\Z)"""
    rb"""|"(?:\\.|[^"\\])*(?:"|\\?\Z)|'(?:\\.|[^'\\])*(?:'|\\?\Z)|`[^`]*(?:`|\Z))"""
    rb"""|(?P<name>[A-Za-z.][\w.]*)|(?P<other>.)""",
    re.DOTALL,
)


def ends_in_run_app(code: bytes) -> bool:
    """Tell whether the last thing R code does at its top level is to call runApp(). A heuristic: it reads tokens."""
    depth = 0
    before = name = b""
    open_call = ends = False
    for token in _TOKEN.finditer(code):
        if token["skip"] is not None:
            continue
        word = token[0]
        if depth == 0 and not (open_call and word == b")") and word != b";":
            ends = False
        if word in b"([{":
            if depth == 0:
                open_call = word == b"(" and name == b"runApp" and before not in {b"$", b"@"}
            depth += 1
        elif word in b")]}":
            depth = max(0, depth - 1)
            if depth == 0:
                ends, open_call = open_call, False
        before, name = name, word
    return ends


def _refuse_own_server(tree: _Tree, path: Parts) -> None:
    parent = _open_directory(tree, path[:-1])
    try:
        descriptor = os.open(path[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    finally:
        os.close(parent)
    with os.fdopen(descriptor, "rb") as file:
        code = file.read(MAX_SCANNED_CODE + 1)
    if len(code) <= MAX_SCANNED_CODE and ends_in_run_app(code):
        raise BundleRefused(
            "calls_run_app", "app.R ends by calling runApp() itself; end it with shinyApp(ui, server) instead."
        )


def give_up_privilege() -> None:
    """Leave this process no more than reading one archive takes, should its parser be taken over."""
    prctl.set_no_new_privs(1)
    for limit, value in (
        (resource.RLIMIT_AS, 512 << 20),
        (resource.RLIMIT_FSIZE, MAX_SIZE),
        (resource.RLIMIT_CPU, 120),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))
    os.umask(0o022)
    reach_nobody()


def _verdict(archive: str, staging: str) -> dict[str, object]:
    try:
        with Path(archive).open("rb") as stream:
            directory = os.open(staging, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            stay_below(directory)
            unpacked = extract(stream, directory)
        os.sync()  # the caller's rename must not become durable before what it names
    except BundleRefused as refused:
        return {"refused": {"code": refused.code, "message": refused.message}}
    except MemoryError:
        return {
            "refused": {"code": "too_complex", "message": "The archive takes too much memory to read; pack it anew."}
        }
    except OSError as error:
        failure = storage_failure(error)
        return {"refused": {"code": failure.code, "message": failure.message}}
    return asdict(unpacked)


def main() -> None:
    """Unpack what the command line names, and print the verdict."""
    archive, staging = sys.argv[1:]
    give_up_privilege()
    sys.stdout.write(json.dumps(_verdict(archive, staging)) + "\n")


if __name__ == "__main__":
    main()
