"""Whether all of this runs in a container, where the engine's command line is what a remedy has to name."""

from pathlib import Path

# Docker's mark, Podman's, and what is in our own image alone, whatever starts it.
_MARKS = ("/.dockerenv", "/run/.containerenv", "/opt/blockyard/scripts/container-init")

# The option that keeps /proc whole, as Docker and as Podman call it.
WHOLE_PROC = "--security-opt systempaths=unconfined (Podman: --security-opt unmask=ALL)"
PROFILE = "--security-opt seccomp=FILE, the file that 'by admin install-seccomp --outer' writes"


def inside() -> bool:
    """Tell whether a container engine has started this."""
    return any(Path(mark).exists() for mark in _MARKS)
