"""That nothing stays of a directory, whatever its owner made of it."""

import errno
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from blockyard_api.bundles.removal import discard, remove

ORDINARY = 65533  # root may read what is closed to everybody

AS_THE_DAEMON = """
import asyncio, os, sys
from pathlib import Path
from blockyard_api.bundles import archive, deploy

state = Path.cwd()
program = state / "program"
program.write_text(
    f"#!/bin/sh\\ncd $5 && mkdir -p app/in && touch app/in/file && chmod 0 app/in/file app/in app . && cat {state}/said"
)
program.chmod(0o755)
(state / "said").write_text('{"refused": {"code": "no", "message": "No."}}')
(state / "uploads").mkdir()
(state / "bundles").mkdir()
sys.executable = str(program)
try:
    asyncio.run(archive.unpack(state / "archive", state / "bundles" / "refused"))
except archive.BundleRefused as refused:
    print(refused.code, os.listdir(state / "bundles"))
left = state / "bundles" / ".cut-off.staging"
(left / "in").mkdir(parents=True)
(left / "in" / "file").touch()
(left / "in").chmod(0)
left.chmod(0)
deploy._clear(state / "uploads", state / "bundles", set())
print(os.listdir(state / "bundles"))
"""


def nested(directory, depth):
    """Make directories in each other, deeper than any path can be."""
    directory.mkdir()
    above = os.open(directory, os.O_DIRECTORY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=above)
        below = os.open("d", os.O_DIRECTORY, dir_fd=above)
        os.close(above)
        above = below
    os.close(above)


def test_directories_closed_to_everybody_go_after_a_refusal_and_at_the_next_start():
    who = {"user": ORDINARY, "group": ORDINARY, "extra_groups": []} if os.getuid() == 0 else {}
    with tempfile.TemporaryDirectory() as state:  # not below a directory of the user who runs the tests
        os.chown(state, who.get("user", -1), who.get("group", -1))
        argv = [sys.executable, "-c", AS_THE_DAEMON]
        done = subprocess.run(argv, cwd=state, text=True, stdout=subprocess.PIPE, check=True, timeout=60, **who)
    assert done.stdout.splitlines() == ["no []", "[]"]


def test_directories_go_however_deep_they_are(tmp_path):
    nested(tmp_path / "deep", 3 * sys.getrecursionlimit())
    remove(tmp_path / "deep")
    assert list(tmp_path.iterdir()) == []


def test_what_links_lead_to_stays_as_it_is(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o500)
    (tmp_path / "bundle" / "in").mkdir(parents=True)
    for link in ("bundle/link", "bundle/in/link"):
        (tmp_path / link).symlink_to(elsewhere)
    remove(tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == [elsewhere]
    assert stat.S_IMODE(elsewhere.stat().st_mode) == 0o500


def test_what_cannot_be_removed_is_logged_and_all_else_goes(tmp_path, monkeypatch, caplog):
    for name in ("a/stuck", "a/file", "b/file", "c/d/e/file"):
        (tmp_path / "bundle" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "bundle" / name).touch()

    def unlink(path, unlink=Path.unlink):
        if path.name == "stuck":
            raise PermissionError(errno.EPERM, "Operation not permitted", str(path))
        unlink(path)

    monkeypatch.setattr(Path, "unlink", unlink)
    discard(tmp_path / "bundle")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.rglob("*")] == ["bundle", "a", "stuck"]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"{tmp_path / 'bundle'} is needed no more" in caplog.text
    assert "Operation not permitted" in caplog.text


def test_what_is_not_there_is_removed_already(tmp_path, caplog):
    discard(tmp_path / "nothing")
    assert caplog.text == ""
    with pytest.raises(FileNotFoundError):
        remove(tmp_path / "nothing")
