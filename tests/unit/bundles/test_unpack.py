"""Archives of every ill intent, read by the real program; what is good is unpacked whole, the rest leaves nothing."""

import asyncio
import contextlib
import gzip
import io
import os
import re
import stat
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from blockyard_api.bundles import unpack as program
from blockyard_api.bundles.archive import BundleRefused, unpack
from blockyard_api.bundles.unpack import ends_in_run_app, extract

APP = b"shinyApp(fluidPage(), function(input, output) {})\n"


def member(name: str, kind: bytes = tarfile.REGTYPE, **fields: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    return member(name, kind, linkname=target)


def tar(*entries: tuple[str, bytes] | tarfile.TarInfo, form: int = tarfile.PAX_FORMAT) -> bytes:
    """Return an uncompressed archive of files (name, content) and of ready-made members."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for entry in entries:
            if isinstance(entry, tarfile.TarInfo):
                archive.addfile(entry)
            else:
                archive.addfile(member(entry[0], size=len(entry[1]), mode=0o644), io.BytesIO(entry[1]))
    return buffer.getvalue()


def packed(*entries: tuple[str, bytes] | tarfile.TarInfo, form: int = tarfile.PAX_FORMAT) -> bytes:
    return gzip.compress(tar(*entries, form=form))


def contents(root: Path) -> dict[str, str | bytes]:
    """Return every path below root: a file's bytes, a link's target, "" for a directory."""
    return {
        str(path.relative_to(root)): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else ""
        for path in root.rglob("*")
    }


def refusal(archive: bytes, tmp_path: Path) -> str:
    """Unpack what must be refused, check that nothing is left, and return the refusal's code."""
    (tmp_path / "in.tar.gz").write_bytes(archive)
    store = tmp_path / "store"
    store.mkdir()
    with pytest.raises(BundleRefused) as refused:
        asyncio.run(unpack(tmp_path / "in.tar.gz", store / "bundle"))
    assert list(store.iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.tar.gz", "store"]
    assert refused.value.message.endswith(".")
    assert refused.value.message.isprintable()
    return refused.value.code


def accepted(archive: bytes, tmp_path: Path) -> tuple[program.BundleInfo, Path]:
    (tmp_path / "in.tar.gz").write_bytes(archive)
    store = tmp_path / "store"
    store.mkdir()
    info = asyncio.run(unpack(tmp_path / "in.tar.gz", store / "bundle"))
    assert [path.name for path in store.iterdir()] == ["bundle"]
    return info, store / "bundle"


def test_a_bundle_is_unpacked_whole_with_modes_that_workers_can_read(tmp_path: Path) -> None:
    archive = packed(
        member(".", tarfile.DIRTYPE, mode=0o700),
        ("./app.R", APP),
        member("./www", tarfile.DIRTYPE, mode=0o000),
        ("./www/deep/style.css", b"body {}"),
        member("./run.sh", mode=0o6755),
        member("./secret", mode=0o200),
        link("./www/other.css", "deep/style.css"),
        link("./hard.R", "./app.R", tarfile.LNKTYPE),
    )
    old = os.umask(0o077)
    try:
        info, root = accepted(archive, tmp_path)
    finally:
        os.umask(old)
    assert info == program.BundleInfo(entry="app.R", files=6, size=len(APP) + 7)
    assert contents(root) == {
        "app.R": APP,
        "hard.R": APP,
        "run.sh": b"",
        "secret": b"",
        "www": "",
        "www/deep": "",
        "www/deep/style.css": b"body {}",
        "www/other.css": "deep/style.css",
    }
    modes = {path.name: stat.S_IMODE(path.lstat().st_mode) for path in [root, *root.rglob("*")]}
    assert modes["run.sh"] == 0o755
    assert modes["secret"] == 0o644
    assert {modes["bundle"], modes["www"], modes["deep"]} == {0o755}


def test_one_common_directory_is_taken_off(tmp_path: Path) -> None:
    _, root = accepted(packed(("my-app/app.R", APP), ("my-app/R/x.R", b""), link("my-app/l", "R/../app.R")), tmp_path)
    assert set(contents(root)) == {"app.R", "R", "R/x.R", "l"}
    assert (root / "l").read_bytes() == APP


def test_names_of_entry_files_may_be_written_in_any_case(tmp_path: Path) -> None:
    info, _ = accepted(packed(("x/Server.r", b""), ("x/UI.R", b"")), tmp_path)
    assert info.entry == "Server.r"


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_tar_format_with_long_names_is_read(tmp_path: Path, form: int) -> None:
    name = "/".join(["directory-of-some-length"] * 8) + "/" + "f" * 50
    _, root = accepted(packed(("app.R", APP), (name, b"x"), form=form), tmp_path)
    assert (root / name).read_bytes() == b"x"


def test_what_tar_itself_packs_is_read(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "www").mkdir(parents=True)
    (source / "app.R").write_bytes(APP)
    (source / "www/ü.css").write_text("x")
    archive = subprocess.run(["tar", "-C", str(source), "-czf", "-", "."], check=True, capture_output=True).stdout
    _, root = accepted(archive, tmp_path)
    assert set(contents(root)) == {"app.R", "www", "www/ü.css"}


ONE = ("app.R", APP)
REFUSED: dict[str, tuple[str, Callable[[], bytes]]] = {
    "empty file": ("not_gzip", lambda: b""),
    "not gzip": ("not_gzip", lambda: tar(ONE)),
    "zip": ("not_gzip", lambda: b"PK\x03\x04" + bytes(100)),
    "gzip of something else": ("not_tar", lambda: gzip.compress(os.urandom(4096))),
    "gzip of nothing": ("not_tar", lambda: gzip.compress(b"")),
    "garbage after the gzip": ("not_gzip", lambda: packed(ONE) + b"garbage"),
    "a second archive's worth of bytes after the end": (
        "header_too_large",
        lambda: gzip.compress(tar(ONE) + os.urandom(3 << 20)),
    ),
    "absolute path": ("absolute_path", lambda: packed(ONE, ("/etc/passwd", b"x"))),
    "parent directory": ("path_outside", lambda: packed(ONE, ("a/../../x", b"x"))),
    "parent directory that stays inside": ("path_outside", lambda: packed(ONE, ("a/../x", b"x"))),
    "absolute directory": ("absolute_path", lambda: packed(ONE, member("/tmp/d", tarfile.DIRTYPE))),
    "absolute link": ("link_outside", lambda: packed(ONE, link("l", "/etc/passwd"))),
    "link to the host through bwrap's old root": ("link_outside", lambda: packed(ONE, link("l", "/oldroot/tmp"))),
    "link up and out": ("link_outside", lambda: packed(ONE, link("d/l", "../../x"))),
    "link out of the common directory": (
        "link_outside",
        lambda: packed(("top/app.R", APP), link("top/l", "../top/app.R")),
    ),
    "link to nothing": ("link_outside", lambda: packed(ONE, link("l", "absent"))),
    "empty link": ("link_outside", lambda: packed(ONE, link("l", ""))),
    "link to itself": ("link_outside", lambda: packed(ONE, link("l", "l"))),
    "two links in a circle": ("link_outside", lambda: packed(ONE, link("a", "b"), link("b", "a"))),
    "links that add up to an escape": (
        "link_outside",
        lambda: packed(ONE, member("d/e", tarfile.DIRTYPE), link("in", "d/e"), link("out", "in/../../..")),
    ),
    "through a file": ("link_outside", lambda: packed(ONE, link("l", "app.R/.."))),
    "hard link out": ("path_outside", lambda: packed(ONE, link("h", "../../etc/passwd", tarfile.LNKTYPE))),
    "hard link absolute": ("link_outside", lambda: packed(ONE, link("h", "/etc/passwd", tarfile.LNKTYPE))),
    "hard link to a link": (
        "link_outside",
        lambda: packed(ONE, link("l", "app.R"), link("h", "l", tarfile.LNKTYPE)),
    ),
    "file through a link": (
        "duplicate_name",
        lambda: packed(ONE, member("d", tarfile.DIRTYPE), link("l", "d"), ("l/x", b"x")),
    ),
    "file over a link": ("duplicate_name", lambda: packed(ONE, link("l", "app.R"), ("l", b"x"))),
    "link over a file": ("duplicate_name", lambda: packed(ONE, link("app.R", "x"))),
    "directory over a link": (
        "duplicate_name",
        lambda: packed(ONE, member("d", tarfile.DIRTYPE), link("l", "d"), member("l", tarfile.DIRTYPE)),
    ),
    "the same file twice": ("duplicate_name", lambda: packed(ONE, ("./app.R", b"other"))),
    "a file and a directory of one name": ("duplicate_name", lambda: packed(ONE, ("x", b""), ("x/y", b""))),
    "character device": ("special_file", lambda: packed(ONE, member("null", tarfile.CHRTYPE, devmajor=1, devminor=3))),
    "block device": ("special_file", lambda: packed(ONE, member("disk", tarfile.BLKTYPE, devmajor=8))),
    "FIFO": ("special_file", lambda: packed(ONE, member("pipe", tarfile.FIFOTYPE))),
    "unknown kind": ("special_file", lambda: packed(ONE, member("odd", b"V"))),
    "sparse file": (
        "special_file",
        lambda: packed(ONE, member("s", pax_headers={"GNU.sparse.size": "9", "GNU.sparse.map": "0,0"})),
    ),
    "control character": ("bad_name", lambda: packed(ONE, ("a\x1b[2Jb", b"x"))),
    "newline": ("bad_name", lambda: packed(ONE, ("a\nb", b"x"))),
    "not UTF-8": ("bad_name", lambda: packed(ONE, ("a\udcffb", b"x"), form=tarfile.GNU_FORMAT)),
    "file without a name": ("bad_name", lambda: packed(ONE, ("./", b"x"))),
    "long component": ("name_too_long", lambda: packed(ONE, ("n" * 256, b"x"))),
    "long path": ("name_too_long", lambda: packed(ONE, ("/".join(["n" * 200] * 6), b"x"))),
    "deep path": ("name_too_long", lambda: packed(ONE, ("d/" * 41 + "x", b"x"))),
    "long link target": ("name_too_long", lambda: packed(ONE, link("l", "./" * 600 + "app.R"))),
    "CVE-2025-4517: a chain of links beyond PATH_MAX": ("link_outside", lambda: packed(*chain())),
    "no entry point": ("no_entry_point", lambda: packed(("x.R", b""))),
    "nothing at all": ("no_entry_point", lambda: gzip.compress(tar())),
    "server.R alone": ("no_entry_point", lambda: packed(("server.R", b""))),
    "entry point below two directories": ("no_entry_point", lambda: packed(("a/b/app.R", APP))),
    "a directory named app.R": ("no_entry_point", lambda: packed(("app.R/x", b""))),
    "two spellings of app.R": ("ambiguous_entry_point", lambda: packed(ONE, ("App.r", APP))),
    "an app that runs itself": ("calls_run_app", lambda: packed(("x/app.R", b"library(shiny)\nshiny::runApp(app)\n"))),
    "an app that runs itself behind a link": (
        "calls_run_app",
        lambda: packed(("m.R", b"runApp(x)"), link("app.R", "m.R")),
    ),
    "too many files": ("too_many_files", lambda: packed(*[(f"f{number}", b"") for number in range(10_001)])),
    "too many directories": ("too_many_files", lambda: packed(*[(f"d{n}/d/d/x", b"") for n in range(4000)])),
    "one directory again and again": (
        "too_many_files",
        lambda: gzip.compress(tar(member("d", tarfile.DIRTYPE))[:512] * 20_001 + bytes(1024)),
    ),
    "21 times its archive": ("too_large", lambda: packed(ONE, ("zeros", bytes(21_000)))),
    "a declared terabyte": ("too_large", lambda: gzip.compress(_declaring(1 << 40))),
    "a negative size": ("not_tar", lambda: gzip.compress(_declaring(-512))),
    "a pax header of 64 MB": (
        "header_too_large",
        lambda: packed(ONE, member("x", pax_headers={"k": "c" * (64 << 20)})),
    ),
    "a GNU long name of 64 MB": ("header_too_large", lambda: packed(("n" * (64 << 20), b""), form=tarfile.GNU_FORMAT)),
}  # fmt: skip


def _declaring(size: int) -> bytes:
    return tar(ONE)[:1024] + member("x", size=size).tobuf(tarfile.GNU_FORMAT) + bytes(1024)


def chain() -> list[tuple[str, bytes] | tarfile.TarInfo]:
    """Links whose resolution grows beyond PATH_MAX, after which os.path.realpath no longer looks."""
    entries: list[tuple[str, bytes] | tarfile.TarInfo] = [ONE]
    directory, path = "d" * 247, ""
    for letter in "abcdefghijklmnop":
        entries += [member(path + directory, tarfile.DIRTYPE), link(path + letter, directory)]
        path = f"{path}{directory}/"
        if len(path) > 700:
            break
    entries.append(link("escape", "/".join("abc") + "/.." * 5 + "/etc"))
    return entries


@pytest.mark.parametrize(("code", "archive"), REFUSED.values(), ids=REFUSED.keys())
def test_it_is_refused_with_its_code_and_nothing_is_left(
    tmp_path: Path, code: str, archive: Callable[[], bytes]
) -> None:
    assert refusal(archive(), tmp_path) == code


@pytest.mark.parametrize("left", [30, 0.5, 0.99])
def test_an_archive_that_is_cut_off_anywhere_is_refused(tmp_path: Path, left: float) -> None:
    whole = packed(ONE, ("data", os.urandom(50_000)))
    cut = whole[: int(left if left >= 1 else left * len(whole))]
    assert refusal(cut, tmp_path) == "truncated"


def test_a_flipped_bit_is_refused(tmp_path: Path) -> None:
    whole = bytearray(packed(ONE, ("data", os.urandom(50_000))))
    whole[-6] ^= 1  # in the checksum
    assert refusal(bytes(whole), tmp_path) in {"not_gzip", "truncated"}


def test_a_deployment_that_is_cancelled_leaves_nothing_and_no_process(tmp_path: Path) -> None:
    with (tmp_path / "in.tar.gz").open("wb") as file, gzip.open(file, "wb", 1) as stream:
        stream.write(tar(ONE, ("data", os.urandom(64 << 20))))
    store = tmp_path / "store"
    store.mkdir()

    async def cancel_once_it_writes() -> None:
        unpacking = asyncio.create_task(unpack(tmp_path / "in.tar.gz", store / "bundle"))
        while not list(store.rglob("data")):
            assert not unpacking.done()
            await asyncio.sleep(0.005)
        unpacking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await unpacking

    asyncio.run(cancel_once_it_writes())
    assert list(store.iterdir()) == []
    running = subprocess.run(["pgrep", "-f", str(tmp_path)], check=False, capture_output=True)
    assert running.stdout == b""


def test_what_an_earlier_attempt_left_is_in_nobodys_way(tmp_path: Path) -> None:
    left = tmp_path / "store/.bundle.staging/app.R"
    left.parent.mkdir(parents=True)
    left.write_text("half")
    (tmp_path / "in.tar.gz").write_bytes(packed(ONE))
    asyncio.run(unpack(tmp_path / "in.tar.gz", tmp_path / "store/bundle"))
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["bundle"]
    assert (tmp_path / "store/bundle/app.R").read_bytes() == APP


def test_the_program_gives_up_what_it_does_not_need() -> None:
    script = (
        "from blockyard_api.bundles.unpack import give_up_privilege; give_up_privilege()\n"
        "print(open('/proc/self/limits').read(), open('/proc/self/status').read())"
    )
    printed = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    for limit, value in (("address space", 512 << 20), ("processes", 0), ("open files", 64)):
        assert re.search(rf"^Max {limit} +{value} +{value} ", printed, re.MULTILINE)
    assert "NoNewPrivs:\t1" in printed


NAMES = st.lists(st.sampled_from(["a", "b", "..", ".", "", "app.R", "server.R", "ui.R"]), max_size=4).map("/".join)
KINDS = st.sampled_from([tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
MEMBERS = st.builds(lambda name, kind, target: member(name, kind, linkname=target), NAMES, KINDS, NAMES)


@settings(max_examples=400, deadline=None)
@given(st.lists(MEMBERS, max_size=12))
@example([member("app.R"), link("a", "."), link("b", "a/a/app.R")])
def test_whatever_the_members_nothing_is_written_outside_and_no_link_leads_out(members: list[tarfile.TarInfo]) -> None:
    with tempfile.TemporaryDirectory() as world:
        staging = Path(world, "outer/staging")
        staging.mkdir(parents=True)
        Path(world, "in.tar.gz").write_bytes(packed(*members))
        descriptor = os.open(staging, os.O_RDONLY)
        try:
            with Path(world, "in.tar.gz").open("rb") as archive:
                unpacked = extract(archive, descriptor)
        except BundleRefused:
            pass
        else:
            root = (staging / unpacked.top).resolve(strict=True)
            assert "r" in {name.lower().rpartition(".")[2] for name in os.listdir(root)}
            for path in root.rglob("*"):
                assert path.resolve(strict=True).is_relative_to(root)
        finally:
            os.close(descriptor)
        assert sorted(os.listdir(world)) == ["in.tar.gz", "outer"]
        assert os.listdir(Path(world, "outer")) == ["staging"]


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=2000), st.integers(0, 5000))
def test_a_damaged_tar_is_refused_or_read_but_never_breaks_the_reader(noise: bytes, place: int) -> None:
    whole = tar(ONE, member("d", tarfile.DIRTYPE), link("l", "d"), ("d/x", b"x" * 700))
    damaged = gzip.compress(whole[:place] + noise + whole[place + len(noise) :])
    with tempfile.TemporaryDirectory() as world, tempfile.TemporaryFile() as archive:
        archive.write(damaged)
        archive.seek(0)
        descriptor = os.open(world, os.O_RDONLY)
        try:
            with contextlib.suppress(BundleRefused):
                extract(archive, descriptor)
        finally:
            os.close(descriptor)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("runApp(app)", True),
        ("shiny::runApp(shinyApp(ui, server), port = 3838)  # start\n\n", True),
        ("app <- shinyApp(ui, server)\nrunApp(app);", True),
        ("shinyApp(ui, server) |>\n  runApp()", True),
        ("if (interactive()) runApp(app)", True),
        ("runApp(app)\nshinyApp(ui, server)", False),
        ("shinyApp(ui, server)  # runApp(app)", False),
        ("shinyApp(ui, server)\n'runApp(app)'", False),
        ('shinyApp(ui, server)\nx <- r"(runApp(")"; shinyApp(ui, server)', False),
        ("start <- function() runApp(app)\nshinyApp(ui, server)", False),
        ("x$runApp(app)", False),
        ("myrunApp(app)", False),
        ("runApp", False),
        ("runApp(app)$value", False),
        ("'unfinished runApp(app)", False),
        ('r"(unfinished runApp(app)', False),
        ("", False),
    ],
)
def test_code_that_ends_in_run_app_is_told_from_code_that_names_it(code: str, expected: bool) -> None:
    assert ends_in_run_app(code.encode()) is expected


@pytest.mark.parametrize("start", [b'r"(', b'"', b"'", b"`", b"runApp("])
def test_code_made_of_openings_that_never_close_is_read_in_one_go(start: bytes) -> None:
    assert ends_in_run_app(start * ((256 << 10) // len(start))) is False
