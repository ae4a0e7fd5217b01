"""The kernel's side of a filter: classic BPF over `struct seccomp_data`, and the calls' numbers by its headers."""

import re
import struct
import subprocess

ALLOW, ERRNO, KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000
_DATA = struct.Struct("<IIQ6Q")  # number, architecture, instruction pointer, arguments

_HEADERS = {
    "x86_64": "#include <asm/unistd_64.h>",
    # What the kernel's own header for this architecture says.
    "aarch64": """
        #define __ARCH_WANT_RENAMEAT
        #define __ARCH_WANT_NEW_STAT
        #define __ARCH_WANT_SET_GET_RLIMIT
        #define __ARCH_WANT_TIME32_SYSCALLS
        #define __ARCH_WANT_SYS_CLONE3
        #define __ARCH_WANT_MEMFD_SECRET
        #include <asm-generic/unistd.h>
    """,
}


def run(program, number, architecture, arguments=()):
    """Return what a filter answers to a call."""
    data = _DATA.pack(number, architecture, 0, *[*arguments, *[0] * 6][:6])
    at, value = 0, 0
    while True:
        code, if_true, if_false, k = program[at]
        at += 1
        match code:
            case 0x20:  # load a word
                value = struct.unpack_from("<I", data, k)[0]
            case 0x54:
                value &= k
            case 0x05:
                at += k
            case 0x15:
                at += if_true if value == k else if_false
            case 0x25:
                at += if_true if value > k else if_false
            case 0x35:
                at += if_true if value >= k else if_false
            case 0x45:
                at += if_true if value & k else if_false
            case 0x06:
                return k
            case _:
                raise AssertionError(f"instruction {at - 1}: {code:#x} is none that the kernel's filters have")


def instructions(program):
    return list(struct.iter_unpack("<HBBI", program))


def numbers(architecture):
    """Name the system calls of an architecture, and give their numbers, by the kernel's headers."""
    source = _HEADERS[architecture]
    argv = ["gcc", "-E", "-dM", "-x", "c", "-"]
    text = subprocess.run(argv, input=source, text=True, capture_output=True, check=True).stdout
    defined = dict(re.findall(r"^#define (__NR\w+) (.+)$", text, re.MULTILINE))

    def value(word):
        word = word.strip("()")
        return int(word) if word.isdigit() else value(defined[word])

    names = {name for name in defined if name.startswith("__NR_")} - {"__NR_syscalls", "__NR_arch_specific_syscall"}
    return {name.removeprefix("__NR_"): value(defined[name]) for name in names}
