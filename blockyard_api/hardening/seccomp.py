"""The workers' system call filter: `policy.toml` in, the kernel's own instructions out, compiled by libseccomp.

libseccomp is called by ctypes: what is needed of it are eight functions, and a binding would be one more dependency of
what root runs. Two programs are compiled and put behind each other, since it cannot say "all but these values":
first what is refused, then what is allowed.

The container that holds both daemons has a profile of its own, which the container engine compiles: `outer`.
"""

import ctypes
import errno
import json
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import files
from typing import Any

import prctl

from blockyard_api.errors import BlockyardError
from blockyard_api.hardening import bpf

# What a container engine calls them, and those that run under the same kernel.
_PROFILE_ARCHITECTURES = {
    "x86_64": {"architecture": "SCMP_ARCH_X86_64", "subArchitectures": []},
    "aarch64": {"architecture": "SCMP_ARCH_AARCH64", "subArchitectures": []},
}

_ON_BAD_ARCHITECTURE, _OPTIMIZE = 2, 8  # SCMP_FLTATR_…
_BINARY_TREE = 2
_MASKED_EQUAL = 7  # SCMP_CMP_MASKED_EQ
_C_INT = 0xFFFFFFFF
_UNKNOWN = -1  # __NR_SCMP_ERROR
_NATIVE = 0  # SCMP_ARCH_NATIVE
_SURPRISED = 255  # no errno: the filter is in force, and answers otherwise


class CannotCompile(BlockyardError):
    """There is no filter to be had from this policy with this libseccomp."""


class DoesNotLoad(BlockyardError):
    """The kernel does not take a filter, or does not hold it."""


class _Comparison(ctypes.Structure):
    """`struct scmp_arg_cmp`."""

    _fields_ = (
        ("argument", ctypes.c_uint),
        ("operator", ctypes.c_int),
        ("mask", ctypes.c_uint64),
        ("value", ctypes.c_uint64),
    )


def read_policy() -> dict[str, Any]:
    """Read the policy that the project ships."""
    return _shipped("policy.toml")


def read_outer() -> dict[str, Any]:
    """Read what the container that holds the pair needs beside the policy."""
    return _shipped("outer.toml")


def _shipped(name: str) -> dict[str, Any]:
    return tomllib.loads((files("blockyard_spawner") / "seccomp" / name).read_text(encoding="utf-8"))


def compiled(policy: Mapping[str, Any], architecture: str) -> bytes:
    """Return the instructions for one architecture, 8 bytes each. Raises CannotCompile."""
    if architecture not in policy["architectures"]:
        known = " or ".join(policy["architectures"])
        raise CannotCompile("unknown_architecture", f"There is no policy for {architecture}; use {known}.")
    otherwise = _answer(policy["otherwise"])
    with _filter(bpf.ALLOW, architecture) as refused:
        for rule in policy["refuse"]:
            refused.add(otherwise, rule["call"], rule["when"])
        refusals = refused.export()
        newest = refused.number(policy["newest"])
    with _filter(otherwise, architecture) as allowed:
        for group in policy["group"]:
            for call in group["calls"]:
                allowed.add(_answer(group.get("answer")), call, [[]])
        for rule in policy["allow"]:
            allowed.add(bpf.ALLOW, rule["call"], rule["when"])
        rest = allowed.export()
    return _going_on(refusals) + _too_new(newest) + rest


def outer(policy: Mapping[str, Any], more: Mapping[str, Any]) -> bytes:
    """Return the profile of the container that holds the pair, as Docker and Podman read it.

    It must allow what the workers' own filter allows, since both are in force, and what makes a worker; a call that
    `more` names has no condition. The policy's refusals stay with the workers.
    """
    opened = {call for group in more["group"] for call in group["calls"]}
    rules = [
        _rule([call for call in group["calls"] if call not in opened], group["why"], answer=group.get("answer"))
        for group in policy["group"]
    ]
    rules += [_rule(group["calls"], group["why"]) for group in more["group"]]
    rules += [
        _rule([rule["call"]], rule["why"], line)
        for rule in policy["allow"]
        if rule["call"] not in opened
        for line in rule["when"]
    ]
    profile = {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": int(getattr(errno, policy["otherwise"])),
        "archMap": [_PROFILE_ARCHITECTURES[name] for name in policy["architectures"]],
        "syscalls": [rule for rule in rules if rule["names"]],
    }
    return json.dumps(profile, indent=2).encode() + b"\n"


def _rule(
    calls: Sequence[str], why: str, line: Sequence[Mapping[str, int]] = (), *, answer: str | None = None
) -> dict[str, Any]:
    """Answer calls under all conditions of one line, in the engines' words."""
    does = {"action": "SCMP_ACT_ERRNO", "errnoRet": int(getattr(errno, answer))} if answer else {}
    compared = [
        {
            "index": each["argument"],
            "value": each.get("mask", _C_INT),
            "valueTwo": each["equals"],
            "op": "SCMP_CMP_MASKED_EQ",
        }
        for each in line
    ]
    return {
        "names": list(calls),
        "action": "SCMP_ACT_ALLOW",
        "args": compared,
        "comment": " ".join(why.split()),
        **does,
    }


def try_out(program: bytes) -> None:
    """Have the kernel load a program into a child, and see there that it answers as the policy says.

    Raises DoesNotLoad.
    """
    child = os.fork()
    if not child:
        status = _SURPRISED
        try:
            status = _under(program)
        finally:
            os._exit(status)
    if status := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        reason = os.strerror(status) if 0 < status < _SURPRISED else f"the child ended with {status}"
        raise DoesNotLoad("filter_does_not_load", f"The kernel does not take the filter ({reason}); report this.")


def _under(program: bytes) -> int:
    """Return 0 where the filter is in force, else the errno of what went wrong."""
    try:
        prctl.set_no_new_privs(1)
        bpf.load(program)
    except OSError as error:
        return error.errno or _SURPRISED
    libc = ctypes.CDLL(None, use_errno=True)
    refused = libc.unshare(0) < 0 and ctypes.get_errno() == errno.EPERM  # without a filter it does nothing, and well
    return 0 if refused and os.getpid() else _SURPRISED


def _answer(name: str | None) -> int:
    return bpf.ALLOW if name is None else bpf.ERRNO | int(getattr(errno, name))


def _going_on(program: bytes) -> bytes:
    """Let a program end behind its last instruction where it would have allowed the call."""
    instructions = list(bpf.INSTRUCTION.iter_unpack(program))
    for at, instruction in enumerate(instructions):
        if instruction == (bpf.RETURN, 0, 0, bpf.ALLOW):
            instructions[at] = (bpf.JUMP, 0, 0, len(instructions) - at - 1)
    return bpf.packed(instructions)


def _too_new(newest: int) -> bytes:
    """Answer ENOSYS to numbers above `newest`, and go on behind with all others."""
    load_number, at_most = (bpf.LOAD, 0, 0, 0), (bpf.JUMP_IF_GREATER, 0, 1, newest)
    return bpf.packed((load_number, at_most, (bpf.RETURN, 0, 0, _answer("ENOSYS"))))


class _Filter:
    """A filter of libseccomp's under construction."""

    def __init__(self, library: ctypes.CDLL, context: int, architecture: str) -> None:
        self._library, self._context = library, ctypes.c_void_p(context)
        for name, value in ((_ON_BAD_ARCHITECTURE, bpf.KILL_PROCESS), (_OPTIMIZE, _BINARY_TREE)):
            self._check(library.seccomp_attr_set(self._context, name, ctypes.c_uint32(value)), "an attribute")
        self._token = ctypes.c_uint32(bpf.ARCHITECTURES[architecture])
        if architecture != bpf.native():
            self._check(library.seccomp_arch_add(self._context, self._token), architecture)
            self._check(library.seccomp_arch_remove(self._context, ctypes.c_uint32(_NATIVE)), bpf.native())

    def number(self, call: str) -> int:
        """Return a call's number on the filter's architecture. Raises CannotCompile."""
        return self._known(call, self._library.seccomp_syscall_resolve_name_arch(self._token, call.encode()))

    def add(self, action: int, call: str, when: Sequence[Sequence[Mapping[str, int]]]) -> None:
        """Answer a call with an action, if all conditions of one line hold. Raises CannotCompile."""
        # Rules name calls by this machine's numbers, or negative ones where it has none; libseccomp translates.
        number = self._known(call, self._library.seccomp_syscall_resolve_name(call.encode()))
        for line in when:
            compared = [
                _Comparison(each["argument"], _MASKED_EQUAL, each.get("mask", _C_INT), each["equals"]) for each in line
            ]
            comparisons = (_Comparison * len(line))(*compared)
            rule = (ctypes.c_uint32(action), number, len(line), comparisons)
            self._check(self._library.seccomp_rule_add_array(self._context, *rule), call)

    def export(self) -> bytes:
        """Return the program. Raises CannotCompile."""
        with os.fdopen(os.memfd_create("seccomp", os.MFD_CLOEXEC), "rb") as file:
            self._check(self._library.seccomp_export_bpf(self._context, file.fileno()), "the whole")
            file.seek(0)
            return file.read()

    @staticmethod
    def _known(call: str, number: int) -> int:
        if number == _UNKNOWN:
            raise CannotCompile("unknown_call", f"libseccomp does not know the call {call}; upgrade libseccomp2.")
        return number

    @staticmethod
    def _check(status: int, what: str) -> None:
        if status < 0:
            raise CannotCompile("cannot_compile", f"libseccomp refused {what}: {os.strerror(-status)}; report this.")


@contextmanager
def _filter(default: int, architecture: str) -> Iterator[_Filter]:
    try:
        library = ctypes.CDLL("libseccomp.so.2")
    except OSError as error:
        raise CannotCompile("no_libseccomp", f"Install Debian's package libseccomp2: {error}.") from error
    library.seccomp_init.restype = ctypes.c_void_p
    context = library.seccomp_init(ctypes.c_uint32(default))
    if not context:
        raise CannotCompile("cannot_compile", "libseccomp made no filter; is there memory left?")
    try:
        yield _Filter(library, context, architecture)
    finally:
        library.seccomp_release(ctypes.c_void_p(context))
