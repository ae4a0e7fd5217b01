"""What `by deploy` sends of a directory, and what stays at home."""

import io
import os
import tarfile
from pathlib import Path

import pytest

from blockyard_api.bundles.unpack import extract
from blockyard_api.cli.client import Failure
from blockyard_api.cli.packing import pack


def directory(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return root


def packed(root: Path) -> tuple[int, bytes]:
    archive = io.BytesIO()
    return pack(root, archive), archive.getvalue()


def names(archive: bytes) -> set[str]:
    with tarfile.open(fileobj=io.BytesIO(archive)) as members:
        return {member.name for member in members if not member.isdir()}


def test_an_app_is_packed_without_what_no_server_needs(tmp_path: Path) -> None:
    kept = {"app.R", "R/x.R", "www/style.css", ".Rprofile", "renv.lock", "renv/activate.R", "data/.git-notes"}
    left = {
        ".git/config", "R/.svn/entries", ".Rproj.user/x", ".Rhistory", ".RData", "sub/.DS_Store", "._app.R",
        "renv/library/R-4.2/shiny/DESCRIPTION", "renv/staging/1", "packrat/lib-R/x", "node_modules/x/index.js",
        "python/__pycache__/x.pyc", "rsconnect/server.dcf",
    }  # fmt: skip
    count, archive = packed(directory(tmp_path, *kept, *left))
    assert names(archive) == kept
    assert count == len(kept)


def test_a_byignore_names_more_by_name_by_path_and_by_pattern(tmp_path: Path) -> None:
    directory(tmp_path, "app.R", "notes.md", "R/notes.md", "data/raw/big.csv", "data/small.csv", "x.tmp")
    (tmp_path / ".byignore").write_text("# not for the server\n*.tmp\nnotes.md\n/data/raw/\n\n")
    assert names(packed(tmp_path)[1]) == {"app.R", "data/small.csv"}


def test_the_same_app_gives_the_same_bytes_whoever_packs_it_and_when(tmp_path: Path) -> None:
    directory(tmp_path, "app.R", "www/x.css")
    first = packed(tmp_path)[1]
    os.utime(tmp_path / "app.R", (1, 1))
    os.chown(tmp_path, os.getuid(), os.getgid())
    assert packed(tmp_path)[1] == first


def test_what_is_packed_can_be_unpacked(tmp_path: Path) -> None:
    source = directory(tmp_path / "source", "App.R", "R/" + "deep/" * 20 + "x.R", "www/ü.css")
    (source / "link.css").symlink_to("www/ü.css")
    (tmp_path / "staging").mkdir()
    (tmp_path / "archive").write_bytes(packed(source)[1])
    descriptor = os.open(tmp_path / "staging", os.O_RDONLY)
    with (tmp_path / "archive").open("rb") as archive:
        unpacked = extract(archive, descriptor)
    os.close(descriptor)
    assert unpacked.info.entry == "App.R"
    assert (tmp_path / "staging/link.css").read_text() == "www/ü.css"


def test_a_link_to_a_directory_is_packed_as_a_link_and_not_walked(tmp_path: Path) -> None:
    directory(tmp_path, "app.R")
    (tmp_path / "loop").symlink_to(".")
    assert names(packed(tmp_path)[1]) == {"app.R", "loop"}


@pytest.mark.parametrize("present", [("notes.txt",), ("server.R",), ("sub/app.R", "notes.txt"), ("a/b/app.R",)])
def test_a_directory_that_is_no_app_is_refused_before_anything_is_sent(
    tmp_path: Path, present: tuple[str, ...]
) -> None:
    with pytest.raises(Failure, match=r"neither app\.R nor server\.R and ui\.R"):
        packed(directory(tmp_path, *present))


def test_a_byignore_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    directory(tmp_path, "app.R")
    (tmp_path / ".byignore").write_bytes(b"\xff\xfe")
    with pytest.raises(Failure, match=r"\.byignore cannot be read"):
        packed(tmp_path)


def test_an_app_below_one_directory_is_packed_as_if_it_were_at_the_top(tmp_path: Path) -> None:
    left = {".git/config", "inner/renv/library/x", "inner/secret.csv", "inner/raw/big.csv", "inner/own/big.csv"}
    directory(tmp_path, "inner/app.R", "inner/R/x.R", *left)
    (tmp_path / ".byignore").write_text("secret.csv\ninner/raw\n")
    (tmp_path / "inner/.byignore").write_text("own/big.csv\n")
    assert names(packed(tmp_path)[1]) == {"inner/app.R", "inner/R/x.R"}


def test_a_link_to_an_app_is_not_the_one_directory_that_holds_it(tmp_path: Path) -> None:
    directory(tmp_path / "elsewhere", "app.R")
    (tmp_path / "source").mkdir()
    (tmp_path / "source/app").symlink_to("../elsewhere")
    with pytest.raises(Failure, match=r"neither app\.R nor"):
        packed(tmp_path / "source")
