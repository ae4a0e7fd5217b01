"""The compiled filter, instruction by instruction as the kernel runs it, against the policy that people read."""

import errno
import itertools
import platform
import random

import pytest
from bpf import ALLOW, ERRNO, KILL_PROCESS, instructions, numbers, run

from blockyard_api.hardening import bpf, seccomp

POLICY = seccomp.read_policy()
EPERM, ENOSYS = ERRNO | errno.EPERM, ERRNO | errno.ENOSYS
BOTH = sorted(bpf.ARCHITECTURES)
X32 = 0x40000000
ONES = (1 << 64) - 1

# What a worker never gets, by whatever arguments: the threats, and what Docker allows to those with a capability.
NEVER = {
    *("add_key", "keyctl", "request_key", "bpf", "perf_event_open", "userfaultfd"),
    *("ptrace", "process_vm_readv", "process_vm_writev", "process_madvise", "pidfd_getfd", "kcmp"),
    *("io_uring_setup", "io_uring_enter", "io_uring_register"),
    *("unshare", "setns", "clone3", "open_by_handle_at", "fanotify_init", "fanotify_mark", "chroot", "pivot_root"),
    *("mount", "umount2", "move_mount", "open_tree", "fsopen", "fsconfig", "fsmount", "fspick", "mount_setattr"),
    *("swapon", "swapoff", "quotactl", "quotactl_fd", "acct", "reboot", "syslog", "vhangup", "lookup_dcookie"),
    *("init_module", "finit_module", "delete_module", "kexec_load", "kexec_file_load"),
    *("sethostname", "setdomainname", "settimeofday", "clock_settime", "adjtimex", "clock_adjtime"),
    *("iopl", "ioperm", "modify_ldt", "_sysctl", "sysfs", "uselib", "nfsservctl", "memfd_secret"),
    *("mbind", "set_mempolicy", "move_pages", "migrate_pages"),
}
# Linux 2.6 as nobody has it any more: what x86-64 alone still numbers.
ONLY_X86 = {"iopl", "ioperm", "modify_ldt", "_sysctl", "sysfs", "uselib"}


def ways(policy):
    """Name each call that is answered by its arguments alone, with the lines of its conditions."""
    return {rule["call"]: rule["when"] for rule in (*policy["allow"], *policy["refuse"])}


def holds(line, arguments):
    return all(arguments[each["argument"]] & each.get("mask", 0xFFFFFFFF) == each["equals"] for each in line)


def expected(name, arguments):
    """What the policy says, read as its head describes it."""
    matches = {
        kind: any(
            rule["call"] == name and any(holds(line, arguments) for line in rule["when"]) for rule in POLICY[kind]
        )
        for kind in ("refuse", "allow")
    }
    if matches["refuse"]:
        return EPERM
    for group in POLICY["group"]:
        if name in group["calls"]:
            return ERRNO | getattr(errno, group["answer"]) if "answer" in group else ALLOW
    return ALLOW if matches["allow"] else EPERM


def tried_arguments(name):
    """Arguments around every boundary of a call's conditions, beyond 32 bits as well; a few where it has none."""
    lines = ways(POLICY).get(name)
    if not lines:
        return [(0,) * 6, (ONES,) * 6, (0x5412, 0x5412, *(7,) * 4)]
    values = [{0, 1, ONES} for _ in range(6)]
    for each in itertools.chain(*lines):
        near = {each["equals"], each["equals"] + 1, each["equals"] ^ 0x80000000}
        flags = {each["equals"] | bit for bit in (0x80000, 0x800, 0x10, 1 << 32, 1 << 63)}
        values[each["argument"]] |= near | flags
    conditioned = {each["argument"] for each in itertools.chain(*lines)}
    single = [1 << bit for bit in range(64)]
    for argument in conditioned if len(conditioned) == 1 else ():
        values[argument] |= {*single, *(one | each["equals"] for one in single for each in itertools.chain(*lines))}
    return itertools.product(*(sorted(values[at]) if at in conditioned else [0] for at in range(6)))


@pytest.fixture(scope="module", params=BOTH)
def compiled(request):
    """An architecture's name, its number, its filter, and its calls."""
    program = instructions(seccomp.compiled(POLICY, request.param))
    return request.param, bpf.ARCHITECTURES[request.param], program, numbers(request.param)


def test_every_call_is_answered_as_the_policy_says(compiled):
    _, token, program, calls = compiled
    names = {number: name for name, number in calls.items()}
    newest = calls[POLICY["newest"]]
    answered = {ALLOW: 0, EPERM: 0, ENOSYS: 0}
    wrong = []
    for number in range(1024):
        name = names.get(number, "")  # no call of that number: an ordinary refusal
        for arguments in tried_arguments(name):
            wanted = ENOSYS if number > newest else expected(name, arguments)
            got = run(program, number, token, arguments)
            answered[wanted] += 1
            if got != wanted:
                wrong.append((number, name, [hex(each) for each in arguments], hex(got), hex(wanted)))
    assert wrong == []
    assert min(answered.values()) > 20  # none of the three was left untried


def test_random_arguments_change_nothing(compiled):
    _, token, program, calls = compiled
    chance = random.Random(1)
    for name in ways(POLICY):
        for _ in range(5_000):
            arguments = [chance.getrandbits(chance.choice((2, 5, 8, 17, 32, 64))) for _ in range(6)]
            assert run(program, calls[name], token, arguments) == expected(name, arguments), (name, arguments)


def test_what_a_worker_must_not_do_is_refused_whatever_the_arguments(compiled):
    architecture, token, program, calls = compiled
    missing = {name for name in NEVER if name not in calls}
    assert missing <= (ONLY_X86 if architecture == "aarch64" else set())
    chance = random.Random(2)
    for name in NEVER - missing:
        for arguments in [(0,) * 6, (ONES,) * 6, *([chance.getrandbits(64) for _ in range(6)] for _ in range(50))]:
            assert run(program, calls[name], token, arguments) in (EPERM, ENOSYS), name


@pytest.mark.parametrize("bit", [17, 25, 26, 27, 28, 29, 30])  # CLONE_NEW… but NEWTIME, which clone does not know
def test_no_process_starts_in_a_namespace_of_its_own(compiled, bit):
    _, token, program, calls = compiled
    fork, thread = 17, 0x3D0F00  # SIGCHLD; what the C library's pthread_create asks for
    for flags in (fork, thread):
        assert run(program, calls["clone"], token, [flags]) == ALLOW
        assert run(program, calls["clone"], token, [flags | 1 << bit]) == EPERM
        assert run(program, calls["clone"], token, [flags | 1 << bit | 1 << 40]) == EPERM


def test_no_answer_is_a_success_that_did_nothing(compiled):
    _, _, program, _ = compiled
    answers = {k for code, _, _, k in program if code == 0x06}
    assert answers == {ALLOW, EPERM, ENOSYS, KILL_PROCESS}  # and no ERRNO | 0


def test_calls_of_another_architecture_end_the_process(compiled):
    _, token, program, calls = compiled
    i386, arm, wrong_endian = 0x40000003, 0x40000028, token ^ 0x40000000
    others = {i386, arm, wrong_endian, 0, ONES & 0xFFFFFFFF, *bpf.ARCHITECTURES.values()} - {token}
    for other in others:
        for number in (*calls.values(), 1 << 20):
            assert run(program, number, other) == KILL_PROCESS


def test_calls_of_x32_end_the_process():
    program = instructions(seccomp.compiled(POLICY, "x86_64"))
    for number in range(1024):
        assert run(program, X32 | number, bpf.ARCHITECTURES["x86_64"], [1, 1]) == KILL_PROCESS


def test_a_number_that_no_kernel_has_is_not_there(compiled):
    architecture, token, program, _ = compiled
    for number in (600, 5000, X32 - 1, *([X32, ONES & 0xFFFFFFFF] if architecture == "aarch64" else [])):
        assert run(program, number, token) == ENOSYS


def test_the_policy_names_no_call_twice():
    named = [call for group in POLICY["group"] for call in group["calls"]] + [rule["call"] for rule in POLICY["allow"]]
    assert sorted(named) == sorted(set(named))
    assert {rule["call"] for rule in POLICY["refuse"]} <= set(named)  # else its refusal would be all there is


def test_every_part_of_the_policy_says_why():
    assert not [part for kind in ("group", "allow", "refuse") for part in POLICY[kind] if not part["why"].strip()]


def test_a_call_that_libseccomp_does_not_know_is_named():
    policy = {**POLICY, "group": [{"calls": ["make_coffee"]}]}
    with pytest.raises(seccomp.CannotCompile, match="make_coffee") as error:
        seccomp.compiled(policy, "x86_64")
    assert error.value.code == "unknown_call"


def test_an_architecture_without_a_policy_is_refused():
    with pytest.raises(seccomp.CannotCompile, match=r"riscv64.*use x86_64 or aarch64"):
        seccomp.compiled(POLICY, "riscv64")


def test_the_kernel_takes_the_filter_and_this_process_stays_free():
    seccomp.try_out(seccomp.compiled(POLICY, platform.machine()))
    with open("/proc/self/status") as status:
        assert "Seccomp_filters:\t0\n" in status.read()


@pytest.mark.parametrize(
    ("program", "word"),
    [
        (b"", "Invalid argument"),
        (b"\xff" * 8, "Invalid argument"),
        (b"\x06\0\0\0\0\0\xff\x7f", "255"),  # one instruction: all is allowed
        (b"\x06\0\0\0\0\0\0\x80", "-31"),  # all ends the process: SIGSYS
    ],
)
def test_a_program_that_is_no_filter_of_ours_is_noticed(program, word):
    with pytest.raises(seccomp.DoesNotLoad, match=word):
        seccomp.try_out(program)
