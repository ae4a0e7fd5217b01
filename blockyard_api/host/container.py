"""Whether this is a container of our image: a remedy there names an option of the engine's command line."""

from pathlib import Path

# In the image alone. An engine's own mark is no proof: /.dockerenv stays in a machine that was made from a container.
_INIT = Path("/opt/blockyard/scripts/container-init")

# The option that keeps /proc whole, as Docker and as Podman call it.
WHOLE_PROC = "--security-opt systempaths=unconfined (Podman: --security-opt unmask=ALL)"
PROFILE = "--security-opt seccomp=FILE, the file that 'by admin install-seccomp --outer' writes"


def inside() -> bool:
    """Tell whether this is our image."""
    return _INIT.exists()
