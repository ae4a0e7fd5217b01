"""The container's system call profile: what makes a sandbox is open, and each opened call is needed."""

import errno
import json
import subprocess

import pytest
from running_container import IMAGE

from blockyard_api.hardening import seccomp

OPENED = {"clone", "clone3", "unshare", "mount", "umount2", "pivot_root", "sethostname"}
# A worker as the spawner starts it, under its own filter, with two lines for an app.
WORKER = """
import os
from blockyard_spawner import config, launch, policy, protocol, sandbox
settings = config.load("/nonexistent", {}, config.KEYS)
request = protocol.Spawn(seq=1, id="worker0001", kind="probe", app="hello", network="none")
wanted = policy.authorize(settings, request)
made = sandbox.files(settings, 60000, "probe", b"print('a worker ran')")
own = settings["process.runtime_dir"] + "/worker0001"
os.makedirs(own)
os.chown(own, 60000, 65534)
filter = open(settings["process.seccomp_profile"], "rb").read()
argv = sandbox.bwrap_argv(settings, wanted, made, lasting=False)
given = [1, 1, *map(launch.open_contents, (*made.values(), filter))]
pid, _ = launch.start(60000, 65534, argv, wanted.env, given, "")
os.waitpid(pid, 0)
"""
# What root may do by an engine's default, or where the kernel alone decides.
TRIED = """
import ctypes
libc, names = ctypes.CDLL(None, use_errno=True), ctypes.CDLL("libseccomp.so.2")
for name in ("ptrace", "chroot", "io_uring_setup"):
    number = names.seccomp_syscall_resolve_name(name.encode())
    print(name, libc.syscall(number, 0, b"/", 0, 0), ctypes.get_errno())
"""
# What no container of ours may do, and a container may by an engine's default or with one more capability.
NEVER = ("ptrace", "setns", "chroot", "bpf", "keyctl", "add_key", "io_uring_setup", "userfaultfd", "perf_event_open",
         "open_by_handle_at", "open_tree", "move_mount", "fsopen", "init_module", "kexec_load", "reboot")  # fmt: skip


@pytest.fixture(scope="module")
def shipped(profile) -> dict:
    return json.loads(profile.read_text())


def test_nothing_is_opened_beside_the_workers_own_policy_but_what_makes_a_sandbox(shipped):
    policy = seccomp.read_policy()
    workers = {call for group in policy["group"] if "answer" not in group for call in group["calls"]}
    conditional = {rule["call"] for rule in policy["allow"]} - OPENED
    allowed = [rule for rule in shipped["syscalls"] if rule["action"] == "SCMP_ACT_ALLOW"]
    free = {name for rule in allowed if not rule["args"] for name in rule["names"]}
    assert free == workers | OPENED
    assert {name for rule in allowed if rule["args"] for name in rule["names"]} == conditional
    assert not free & set(NEVER)
    assert shipped["defaultAction"] == "SCMP_ACT_ERRNO"


def run(engine, directory, profile: dict, script: str) -> subprocess.CompletedProcess[str]:
    file = directory / "profile.json"
    file.write_text(json.dumps(profile))
    options = ["--rm", "--network", "none", "--security-opt", f"seccomp={file}"]
    options += ["--security-opt", "systempaths=unconfined"]
    return engine.run(
        "run", *options, "--entrypoint", "/opt/blockyard/venv/bin/python", IMAGE, "-c", script, check=False
    )


def without(profile: dict, call: str) -> dict:
    rules = [{**rule, "names": [name for name in rule["names"] if name != call]} for rule in profile["syscalls"]]
    return {**profile, "syscalls": [rule for rule in rules if rule["names"]]}


def test_a_worker_runs_under_it(container_engine, tmp_path, shipped):
    assert "a worker ran" in run(container_engine, tmp_path, shipped, WORKER).stdout


@pytest.mark.parametrize("call", sorted(OPENED))
def test_a_worker_does_not_run_without_any_one_of_the_calls_that_it_opens(container_engine, tmp_path, shipped, call):
    done = run(container_engine, tmp_path, without(shipped, call), WORKER)
    assert "a worker ran" not in done.stdout
    assert "not permitted" in done.stdout + done.stderr or "No permissions" in done.stdout, done


def test_what_root_has_by_an_engines_default_is_refused(container_engine, tmp_path, shipped):
    done = run(container_engine, tmp_path, shipped, TRIED)
    assert [line.split()[1:] for line in done.stdout.splitlines()] == [["-1", str(errno.EPERM)]] * 3, done
