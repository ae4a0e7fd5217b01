"""What this kernel can do, which decides what stops an attack here: asked of the kernel itself."""

import ctypes

LANDLOCK_CREATE_RULESET, LANDLOCK_VERSION = 444, 1  # the same number on every architecture
SCOPES_FROM = 6  # the version of Landlock that keeps a process to the abstract sockets of its own: Linux 6.12


def scopes_abstract_sockets():
    """Whether Landlock is on, and new enough."""
    return ctypes.CDLL(None).syscall(LANDLOCK_CREATE_RULESET, None, 0, LANDLOCK_VERSION) >= SCOPES_FROM
