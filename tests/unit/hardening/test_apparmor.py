"""AppArmor's profile is written whole, checked, loaded where that is possible; and what forbids a sandbox is told."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from blockyard_api.hardening import apparmor

UNIT = Path(__file__).parents[3] / "systemd" / "blockyard-spawner.service"
REFUSAL = "AppArmor parser error for {} in profile {} at line 10: Could not open 'abi/4.0': No such file or directory"


@pytest.fixture
def machine(tmp_path):
    """A function that makes a root directory with these files of the kernel in it, and returns it."""

    def make(files):
        for name, text in files.items():
            path = tmp_path / "machine" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")
        return tmp_path / "machine"

    return make


@pytest.fixture
def etc(tmp_path, monkeypatch):
    """A directory of its own in the place of /etc/apparmor.d."""
    directory = tmp_path / "apparmor.d"
    monkeypatch.setattr(apparmor, "TARGET", directory / "blockyard")
    return directory


@pytest.fixture
def parser(tmp_path):
    """A function that makes a parser with this exit status, which notes what it was asked."""

    def make(status, says=""):
        path = tmp_path / "parser"
        path.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/asked\necho "{says}" >&2\nexit {status}\n')
        path.chmod(0o755)
        return str(path)

    return make


MEDIATED = {
    "sys/module/apparmor/parameters/enabled": "Y",
    "sys/kernel/security/apparmor/features/namespaces/mask": "userns_create",
    "proc/sys/user/max_user_namespaces": "11883",
}
UNMEDIATED = {"sys/module/apparmor/parameters/enabled": "Y", "proc/sys/user/max_user_namespaces": "11883"}


def test_the_profile_is_attached_to_no_program_and_is_the_one_the_unit_names():
    text = re.sub(r"(?m)#.*$", "", apparmor.POLICY.read_text())
    (head,) = re.findall(r"^profile (.*)\{$", text, re.MULTILINE)
    name, _, flags = head.partition(" ")
    assert name == apparmor.PROFILE
    assert flags.strip() == "flags=(attach_disconnected, mediate_deleted)"
    assert "  userns,\n" in text
    assert "deny" not in text
    assert f"AppArmorProfile=-{apparmor.PROFILE}\n" in UNIT.read_text()


def test_an_accepted_profile_is_written_for_everybody_to_read_and_loaded(etc, parser, machine, tmp_path):
    done = apparmor.install(etc / "blockyard", parser=parser(0), root=machine(MEDIATED))
    assert done == apparmor.Installed(etc / "blockyard", changed=True, loaded=True, warnings=())
    assert (etc / "blockyard").read_bytes() == apparmor.POLICY.read_bytes()
    assert (etc / "blockyard").stat().st_mode & 0o7777 == 0o644
    assert (tmp_path / "asked").read_text() == f"-QT {etc}/blockyard\n-r {etc}/blockyard\n"
    assert [path.name for path in etc.iterdir()] == ["blockyard"]


def test_written_again_it_stays_as_it_is_and_a_changed_one_is_put_right(etc, parser, machine):
    root = machine(MEDIATED)
    apparmor.install(etc / "blockyard", parser=parser(0), root=root)
    inode = (etc / "blockyard").stat().st_ino
    assert not apparmor.install(etc / "blockyard", parser=parser(0), root=root).changed
    assert (etc / "blockyard").stat().st_ino == inode
    (etc / "blockyard").chmod(0o600)
    assert apparmor.install(etc / "blockyard", parser=parser(0), root=root).changed
    (etc / "blockyard").write_text("profile blockyard { }\n")
    assert apparmor.install(etc / "blockyard", parser=parser(0), root=root).changed
    assert (etc / "blockyard").read_bytes() == apparmor.POLICY.read_bytes()


def test_a_parser_that_is_too_old_is_a_warning_and_its_service_still_starts(etc, parser, machine, tmp_path):
    done = apparmor.install(etc / "blockyard", parser=parser(1, REFUSAL), root=machine(UNMEDIATED))
    assert (done.changed, done.loaded) == (True, False)
    assert "Could not open 'abi/4.0'" in done.warnings[0]
    assert "Nothing is lacking" in done.warnings[1]
    assert (etc / "blockyard").exists()
    assert (etc / "disable" / "blockyard").resolve() == etc / "blockyard"
    assert "\n-r" not in (tmp_path / "asked").read_text()


def test_a_kernel_that_asks_about_user_namespaces_wants_a_newer_parser(etc, parser, machine):
    done = apparmor.install(etc / "blockyard", parser=parser(1, REFUSAL), root=machine(MEDIATED))
    assert "parser of version 4" in done.warnings[1]


def test_after_an_upgrade_of_the_parser_the_profile_is_no_longer_disabled(etc, parser, machine):
    root = machine(MEDIATED)
    apparmor.install(etc / "blockyard", parser=parser(1, REFUSAL), root=root)
    assert apparmor.install(etc / "blockyard", parser=parser(0), root=root).loaded
    assert not (etc / "disable" / "blockyard").is_symlink()


def test_what_the_kernel_does_not_take_is_told(etc, parser, machine, tmp_path):
    refusing = Path(parser(0))
    refusing.write_text('#!/bin/sh\n[ "$1" = -QT ] || { echo "Access denied. You need policy admin" >&2; exit 1; }\n')
    done = apparmor.install(etc / "blockyard", parser=str(refusing), root=machine(MEDIATED))
    assert not done.loaded
    assert done.warnings == ("The kernel did not take it: Access denied. You need policy admin",)


def test_without_apparmor_in_the_kernel_or_elsewhere_than_it_reads_nothing_is_loaded(etc, parser, machine, tmp_path):
    off = apparmor.install(etc / "blockyard", parser=parser(0), root=machine({}))
    elsewhere = apparmor.install(tmp_path / "staged" / "blockyard", parser=parser(0), root=machine(MEDIATED))
    assert not off.loaded
    assert not elsewhere.loaded
    assert "without AppArmor" in off.warnings[0]
    assert f"AppArmor reads {etc} alone" in elsewhere.warnings[0]
    assert "\n-r" not in (tmp_path / "asked").read_text()


def test_without_a_parser_it_is_written_all_the_same(etc, machine, monkeypatch):
    monkeypatch.setattr(apparmor, "PARSER", "no-such-parser")
    done = apparmor.install(etc / "blockyard", root=machine(MEDIATED))
    assert done.changed
    assert "not installed" in done.warnings[0]


def test_a_write_that_fails_leaves_the_old_profile_and_nothing_else(etc, parser, monkeypatch):
    etc.mkdir()
    (etc / "blockyard").write_text("old\n")

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(apparmor.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        apparmor.install(etc / "blockyard", parser=parser(0))
    assert (etc / "blockyard").read_text() == "old\n"
    assert [path.name for path in etc.iterdir()] == ["blockyard"]


def test_the_command_tells_in_words_and_as_data_what_it_did(tmp_path):
    by = [sys.executable, "-c", "from blockyard_api.cli.main import main; main()"]
    target = tmp_path / "blockyard"
    asked = [*by, "admin", "install-apparmor", "--target", str(target), "--json"]
    answer = subprocess.run(asked, capture_output=True, text=True, timeout=60, check=True)
    told = json.loads(answer.stdout)
    assert (told["target"], told["changed"], told["loaded"]) == (str(target), True, False)
    assert told["warnings"]
    assert answer.stderr == ""
    said = subprocess.run(asked[:-1], capture_output=True, text=True, timeout=60, check=True)
    assert said.stderr.count("Warning: ") == len(told["warnings"])
    asked = [*by, "admin", "install-apparmor", f"--target={tmp_path}/blockyard/below"]
    refused = subprocess.run(asked, capture_output=True, text=True, timeout=60, check=False)
    assert refused.returncode == 1
    assert "cannot be written" in refused.stderr
    assert "Traceback" not in refused.stderr
