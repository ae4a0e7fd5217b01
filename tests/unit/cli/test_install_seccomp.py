"""`by admin install-seccomp`, as an operator runs it."""

import errno
import json
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from blockyard_api.hardening import apparmor, bpf, seccomp

BY = Path(sys.executable).with_name("by")


def by(*arguments, cwd="/", text=True, **options):
    return subprocess.run(
        [BY, "admin", "install-seccomp", *map(str, arguments)],
        capture_output=True, text=text, timeout=60, check=False, cwd=cwd, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def program():
    return seccomp.compiled(seccomp.read_policy(), bpf.native())


def test_the_filter_is_put_where_it_is_wanted_readable_by_all(tmp_path, program):
    target = tmp_path / "new" / "seccomp.bpf"
    done = by("--target", target)
    assert done.returncode == 0, done.stderr
    assert f"{target}: {len(program) // 8} instructions for {bpf.native()}, tried out" in done.stdout
    assert "name it as process.seccomp_profile and restart blockyard-spawner" in done.stdout
    assert target.read_bytes() == program
    assert stat.S_IMODE(target.stat().st_mode) == 0o644


def test_a_second_time_changes_nothing(tmp_path):
    target = tmp_path / "seccomp.bpf"
    by("--target", target)
    before = target.stat()
    done = by("--target", target)
    assert done.stdout.strip().endswith("unchanged.")
    assert (target.stat().st_ino, target.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize("spoil", [lambda file: file.write_bytes(b"\0" * 8), lambda file: file.chmod(0o600)])
def test_another_file_is_replaced_in_one_step(tmp_path, program, spoil):
    target = tmp_path / "seccomp.bpf"
    by("--target", target)
    spoil(target)
    with target.open("rb") as of_a_running_reader:
        assert json.loads(by("--target", target, "--json").stdout)["changed"] is True
        of_a_running_reader.seek(0)
        assert of_a_running_reader.read() in (b"\0" * 8, program)  # the old one, whole
    assert target.read_bytes() == program
    assert [file.name for file in tmp_path.iterdir()] == ["seccomp.bpf"]


def test_another_machines_filter_is_compiled_but_not_tried_out(tmp_path):
    target = tmp_path / "seccomp.bpf"
    other = next(name for name in bpf.ARCHITECTURES if name != bpf.native())
    told = json.loads(by("--arch", other, "--target", target, "--json").stdout)
    assert (told["architecture"], told["tried"]) == (other, False)
    assert target.read_bytes() == seccomp.compiled(seccomp.read_policy(), other)


def test_who_may_not_write_there_is_told_so_in_one_sentence(tmp_path):
    tmp_path.chmod(0o755)
    done = by("--target", tmp_path / "seccomp.bpf", user=65533, group=65533, extra_groups=[])
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "run this as root" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_architecture_is_told_so_in_one_sentence(tmp_path):
    done = by("--arch", "riscv64", "--target", tmp_path / "seccomp.bpf")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "use x86_64 or aarch64" in done.stderr


def test_the_profile_of_a_container_is_put_where_it_is_wanted_and_printed_for_who_has_no_place_yet(tmp_path):
    target = tmp_path / "new" / "seccomp.json"
    done = by("--outer", "--target", target)
    assert done.returncode == 0, done.stderr
    assert f"--security-opt seccomp={target}" in done.stdout
    assert stat.S_IMODE(target.stat().st_mode) == 0o644
    assert json.loads(target.read_text())["defaultAction"] == "SCMP_ACT_ERRNO"
    assert by("--outer", "--target", target).stdout.strip().endswith("unchanged.")
    assert by("--outer", "--target", "-").stdout == target.read_text()


def test_the_profile_of_a_container_names_a_condition_as_the_policy_does(tmp_path):
    target = tmp_path / "seccomp.json"
    by("--outer", "--target", target)
    rules = json.loads(target.read_text())["syscalls"]
    (pairs,) = [rule for rule in rules if rule["names"] == ["socketpair"]]
    assert pairs["args"] == [{"index": 0, "value": 0xFFFFFFFF, "valueTwo": 1, "op": "SCMP_CMP_MASKED_EQ"}]
    assert {rule["errnoRet"] for rule in rules if rule["action"] == "SCMP_ACT_ERRNO"} == {errno.ENOSYS}
    assert [rule["args"] for rule in rules if "clone" in rule["names"]] == [[]]


def test_a_dash_is_standard_output_for_the_filter_too(tmp_path, program):
    assert by("--target", "-", cwd=tmp_path, text=False).stdout == program
    assert list(tmp_path.iterdir()) == []


def test_a_dash_is_standard_output_for_the_apparmor_profile_too(tmp_path):
    done = subprocess.run(
        [BY, "admin", "install-apparmor", "--target", "-"],
        capture_output=True, timeout=60, check=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.stdout == apparmor.POLICY.read_bytes()
    assert list(tmp_path.iterdir()) == []
