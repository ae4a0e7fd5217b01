"""What hostile code in a worker tries, what stops it, and what would come of it without that: the table.

Each attack runs as an app through the front door, where it must be stopped. Each of its steps runs in the same sandbox
with layers switched off: there it succeeds, or the next layer stops it. Data alone; `{names}` are the target's, and
what only some kernels have is decided by the kernel at hand.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kernel import scopes_abstract_sockets
from layers import ABSTRACT, DESCRIPTORS, FILTER, OPEN_FILES, TERMINAL

PROCESSES, IPC = "the process namespace", "the IPC namespace"
NETWORK, USERNS = "the network namespace", "the ban on user namespaces"
REACH = "python3 -I /app/reach.py"


@dataclass(frozen=True)
class Step:
    """Layers switched off, and what is seen then."""

    then: str  # the next layer that stops it, or "" when it succeeds
    seen: str  # a pattern
    how: Mapping[str, object] = field(default_factory=dict)  # see Shell.weakened
    command: str = ""  # where another one shows it better


@dataclass(frozen=True)
class Attack:
    """One attempt."""

    name: str
    row: int  # of the threat model
    layer: str  # what stops it first
    command: str
    stopped: str  # a pattern: how it is seen to be stopped, which also shows that it was tried
    succeeded: str  # a pattern that must not be seen
    steps: Sequence[Step]


GONE = "(?i)no such file|nonexistent"
DENIED = "Permission denied"
ALLOWED = "the root by allow-list"
MISSING = "Directory nonexistent"

# What would widen a worker's limits, or take it out of them. The last one ends there: 0 is whoever writes it.
LIMITS = {
    "pids.max": "max", "memory.max": "max", "memory.high": "max", "memory.swap.max": "max", "cpu.max": "max",
    "cgroup.max.descendants": "7", "cgroup.subtree_control": "-pids", "cgroup.procs": "0",
}  # fmt: skip


def widening(directory: str) -> str:
    """Try each of them in a cgroup's directory."""
    return "; ".join(f"(echo {value} > {directory}/{name}) && echo {name} moved" for name, value in LIMITS.items())


def each_limit(how: str) -> str:
    """See each of them stopped."""
    return "(?s)" + ".*".join(f"/{re.escape(name)}: {how}" for name in LIMITS)


ATTACKS = [
    Attack("reads another app's bundle", 1, ALLOWED, "cat {bundle}/secret.txt", GONE, "{canary}",
           [Step("", "{canary}", {"show": ["{state}"]})]),
    Attack("lists the bundles", 1, ALLOWED, "ls {state}/bundles", GONE, "[0-9a-f]{{32}}",
           [Step("modes: passed through, not listed", DENIED, {"show": ["{state}"]})]),
    Attack("reads another app's library", 1, ALLOWED, "cat {state}/libraries/theirs/secret", GONE, "{canary}",
           [Step("", "{canary}", {"show": ["{state}"]})]),
    Attack("reads another app's log and the database", 1, ALLOWED,
           "cat {state}/logs/* {state}/blockyard.db", GONE, "{canary}|SQLite",
           [Step("modes: the API's alone", DENIED, {"show": ["{state}"]})]),
    Attack("reads the configuration", 1, ALLOWED, "cat {config}", GONE, "(?i)storage",
           [Step("", "(?i)storage", {"show": ["{config}"]})]),
    Attack("reads another worker's temporary files", 1, PROCESSES, "cat /proc/{pid}/root/tmp/secret", GONE, "{canary}",
           [Step("the uid of its own", DENIED, {"off": [PROCESSES]}),
            Step("the user namespace", DENIED, {"off": [PROCESSES], "uid": "{uid}"})]),
    Attack("reads another worker's environment", 8, PROCESSES, "cat /proc/{pid}/environ", GONE, "{canary}|BLOCKYARD_",
           [Step("the uid of its own", DENIED, {"off": [PROCESSES]}),
            Step("the user namespace", DENIED, {"off": [PROCESSES], "uid": "{uid}"})]),
    Attack("sees another worker's processes", 8, PROCESSES, "ls -d /proc/{pid}", GONE, "^/proc/{pid}$",
           [Step("", "^/proc/{pid}$", {"off": [PROCESSES]})]),
    Attack("signals another worker", 8, PROCESSES, "/tmp/attack kill {pid}", "ESRCH", "ok",
           [Step("the uid of its own", "EPERM", {"off": [PROCESSES]}),
            Step("", "ok", {"off": [PROCESSES], "uid": "{decoy_uid}"}, "/tmp/attack kill {decoy}")]),
    Attack("traces another worker", 8, FILTER, "/tmp/attack ptrace {pid}", "EPERM|ESRCH|ENOSYS", "ok",
           [Step("the process namespace", "ESRCH", {"off": [FILTER]}),
            Step("the uid of its own", "EPERM", {"off": [FILTER, PROCESSES]}),
            Step("the user namespace", "EPERM", {"off": [FILTER, PROCESSES], "uid": "{decoy_uid}"},
                 "/tmp/attack ptrace {decoy}")]),
    Attack("reads another worker's memory", 8, FILTER, "/tmp/attack process_vm_readv {pid}", "EPERM|ESRCH|ENOSYS", "ok",
           [Step("the process namespace", "ESRCH", {"off": [FILTER]}),
            Step("the uid of its own", "EPERM", {"off": [FILTER, PROCESSES]})]),
    Attack("connects to another worker", 7, ALLOWED, REACH + " unix {socket}", "ENOENT", "connected",
           [Step("the mode of the socket's directory", "EACCES", {"show": ["{runtime}"]}),
            Step("", "connected", {"show": ["{runtime}"], "uid": "{uid}"})]),
    Attack("connects to the spawner", 33, ALLOWED, REACH + " seqpacket {spawner_socket}", "ENOENT", "connected",
           [Step("the socket's mode and group", "EACCES", {"show": ["{spawner_directory}"]})]),
    Attack("connects to a host's service by its socket", 7, ALLOWED, REACH + " unix {service}", "ENOENT", "connected",
           [Step("", "connected", {"show": ["{service_directory}"]})]),
    Attack("connects to an abstract socket", 7, NETWORK, REACH + " abstract {abstract}", "ECONNREFUSED", "connected",
           [*([Step(ABSTRACT, "^EPERM$", {"network": "host"})] if scopes_abstract_sockets() else []),
            Step("", "^connected$", {"network": "host", "off": [ABSTRACT]})]),
    Attack("connects to a loopback service", 7, NETWORK, REACH + " tcp 127.0.0.1 {port}", "ECONNREFUSED|ENETUNREACH",
           "connected", [Step("", "connected", {"network": "host"})]),
    Attack("asks the metadata address", 7, NETWORK, REACH + " tcp 169.254.169.254 80", "ENETUNREACH", "connected", []),
    Attack("asks the API in another's name", 20, NETWORK, REACH + " http 127.0.0.1 {api_port}",
           "ECONNREFUSED|ENETUNREACH", "HTTP/1.1 200",
           [Step("the API believes no such header", "HTTP/1.1 401", {"network": "host"})]),
    Attack("changes the program that runs it", 6, "the read-only /usr",
           "(: > /proc/1/exe) && echo changed; (: > /proc/self/exe) && echo changed",
           "Read-only file system|Text file busy|Permission denied", "changed",
           [Step("the programs are root's", DENIED, {"words": ["--bind /usr /usr"]},
                 "(echo > /usr/bin/bwrap) && echo changed")]),
    Attack("leaves by the root of process 1", 6, PROCESSES, "cat /proc/1/root{config}", GONE, "(?i)storage",
           [Step("the uid of its own", DENIED, {"off": [PROCESSES]})]),
    Attack("leaves by a descriptor that was left open", 4, DESCRIPTORS,
           "for d in /proc/self/fd/* /proc/1/fd/*; do cat $d/{config} 2>/dev/null; done; echo tried", "tried",
           "(?i)storage", [Step("", "(?i)storage", {"off": [DESCRIPTORS]})]),
    Attack("has the kernel run a program at a crash", 6, "the read-only /proc/sys",
           "(echo '|/tmp/attack' > /proc/sys/kernel/core_pattern) && echo changed",
           "Read-only file system|Permission denied", "changed",
           [Step("the file is root's", DENIED, {"off": [PROCESSES]})]),
    Attack("moves itself to another cgroup", 9, ALLOWED, "(echo $$ > {cgroup}/cgroup.procs) && echo moved", GONE,
           "moved", [Step("the files are root's", DENIED, {"show": ["{cgroup}"]})]),
    Attack("changes another worker's limits", 9, ALLOWED,
           "(echo max > {cgroup}/workers/{id}/cgroup.max.depth) && echo moved", GONE, "moved",
           [Step("the files are root's", DENIED, {"show": ["{cgroup}"]})]),
    Attack("widens its own limits", 9, ALLOWED, widening("{cgroup}/workers/{own_id}"), each_limit(MISSING), "moved",
           [Step("the files are root's", each_limit(DENIED), {"show": ["{cgroup}"], "uid": "{own_uid}"}),
            Step("", "^cgroup.max.descendants moved$", {"show": ["{given}"], "uid": "{decoy_uid}"},
                 widening("{given}"))]),
    Attack("widens the limits of what it finds as its own", 9, ALLOWED,
           widening("/sys/fs/cgroup$(sed -n s/^0:://p /proc/self/cgroup)"), each_limit(MISSING), "moved", []),
    Attack("names a release agent", 6, ALLOWED,
           "ls /sys/fs/cgroup; find / -xdev -name release_agent -print; echo looked", GONE, "^/.*release_agent", []),
    Attack("reads shared memory of the host", 13, IPC, "/tmp/attack find_shm", "ENOENT", "CANARY",
           [Step("", "CANARY", {"off": [IPC]})]),
    Attack("opens a message queue of the host", 13, IPC, "/tmp/attack find_queue", "ENOENT", "ok",
           [Step("", "ok", {"off": [IPC]})]),
    Attack("changes its bundle", 1, "the bundle's read-only bind", "(echo > /app/app.R) && echo changed",
           "Read-only file system", "changed",
           [Step("the files are the API's", DENIED, {"words": ["--bind {own_bundle} /app"]})]),
    Attack("changes the system's programs", 1, "the read-only /usr", "(echo > /usr/bin/mine) && echo changed",
           "Read-only file system", "changed", [Step("the files are root's", DENIED, {"words": ["--bind /usr /usr"]})]),
    Attack("adds to the root", 1, "the read-only root", "mkdir /mine && echo made", "Read-only file system", "made",
           [Step("", "made", {"off": ["the read-only root"]})]),
    Attack("reads the kernel's log and the disks", 1, "the minimal /dev",
           "head -c1 /dev/kmsg; ls /dev/mem /dev/vda /dev/sda; echo tried", GONE, "^/dev",
           [Step("the devices are root's", DENIED + "|not permitted", {"words": ["--dev-bind /dev /dev"]},
                 "head -c1 /dev/kmsg")]),
    Attack("fills its temporary directory", 10, "the sizes",
           "head -c {too_much} /dev/zero > /tmp/big; stat -c %s /tmp/big; rm /tmp/big",
           "No space left", "^{too_much}$", [Step("", "^{too_much}$", {"off": ["the sizes"]})]),
    Attack("fills its shared memory", 10, "the sizes",
           "head -c 80000000 /dev/zero > /dev/shm/big; stat -c %s /dev/shm/big; rm /dev/shm/big",
           "No space left", "^80000000$", [Step("", "^80000000$", {"off": ["the sizes"]})]),
    Attack("opens files without end", 10, OPEN_FILES, "/tmp/attack descriptors", r"^40\d\d EMFILE", r"^\d{{5,}}",
           [Step("", r"^19\d\d\d EMFILE", {"off": [OPEN_FILES]})]),
    Attack("mounts in a user namespace of its own", 6, FILTER, "unshare -Urm mount -t tmpfs none /tmp && echo mounted",
           "unshare failed", "mounted",
           [Step(USERNS, "unshare failed: No space left", {"off": [FILTER]}),
            Step("", "mounted", {"off": [FILTER, USERNS]})]),
]  # fmt: skip

CAPABILITY = "no capability"
NO_ROOT = "a user namespace that knows no root"


@dataclass(frozen=True)
class Call:
    """One system call that the filter refuses, whatever else would."""

    name: str  # of the attempt in attack.c
    then: str  # the next layer, or "" when it succeeds without the filter
    seen: str  # what it says then
    row: int = 6


OWN_KERNEL = "|EAFNOSUPPORT|ENOENT|ENOSYS"  # not every kernel has it
CALLS = [
    *(Call(name, "", "ok", 13) for name in ("keyctl", "add_key", "request_key")),
    Call("bpf", "kernel.unprivileged_bpf_disabled", "EPERM"),
    Call("io_uring", "", "ok" + OWN_KERNEL),
    Call("userfaultfd", "", "ok" + OWN_KERNEL),
    Call("perf_event_open", "kernel.perf_event_paranoid, on Debian", "ok|EACCES" + OWN_KERNEL),
    Call("AF_VSOCK", "", "ok" + OWN_KERNEL),
    Call("AF_ALG", "", "ok" + OWN_KERNEL),
    *(Call(name, CAPABILITY, "EPERM|EAFNOSUPPORT") for name in ("AF_PACKET", "AF_KEY", "raw", "raw_cloexec")),
    *(Call(name, TERMINAL, "ENOTTY", 5) for name in ("TIOCSTI", "TIOCSTI_high", "TIOCLINUX")),
    *(Call(name, "", "ok", 8) for name in ("ptrace_child", "process_vm_readv_own")),
    *(Call(name, USERNS, "ENOSPC") for name in ("unshare_user", "clone_user", "clone3_user")),
    *(Call(name, CAPABILITY, "EPERM") for name in ("unshare_mount", "unshare_net", "setns")),
    *(Call(name, CAPABILITY, "EPERM") for name in (
        "mount_tmpfs", "mount_cgroup", "mount_cgroup2", "remount", "umount", "pivot_root", "chroot", "fsopen",
        "open_tree", "mount_setattr", "open_by_handle_at", "sethostname", "reboot", "swapon", "acct",
        "clock_settime")),
    *(Call(name, CAPABILITY, "EPERM" + OWN_KERNEL) for name in ("kexec_load", "init_module", "finit_module")),
    Call("syslog", "kernel.dmesg_restrict, on Debian", "ok|EPERM"),
]  # fmt: skip


@dataclass(frozen=True)
class PrivilegedCall:
    """One that the filter lets through, since it has uses that need no privilege: the kernel refuses this use of it."""

    name: str
    layer: str  # what stops it
    seen: str  # the kernel's own answer, the same with the filter and without
    row: int = 6


PRIVILEGED_CALLS = [
    PrivilegedCall("mknod", CAPABILITY, "EPERM"),  # a device; FIFOs are made by it, too
    PrivilegedCall("realtime", CAPABILITY, "EPERM"),
    PrivilegedCall("setgroups", CAPABILITY, "EPERM"),
    *(PrivilegedCall(name, NO_ROOT, "EINVAL") for name in ("setuid", "setgid")),
]

# TIOCSTI's further layers, one after the other: what is off, what stops it then, what it says.
TERMINAL_STEPS = [
    ([FILTER, TERMINAL], "the session of its own", "EPERM|EIO"),
    ([FILTER, TERMINAL, "the session of its own"], "the kernel, where dev.tty.legacy_tiocsti is off", "ok|EIO"),
]
