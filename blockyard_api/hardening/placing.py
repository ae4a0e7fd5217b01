"""Files that root reads: replaced in one step, so that nobody ever finds half of one."""

import os
import tempfile
from pathlib import Path

_MODE = 0o644  # they are no secrets, and only their owner may change them


def put(target: Path, content: bytes) -> bool:
    """Replace a file as a whole, mode 0644; tell whether that changed anything. Raises OSError."""
    if target.is_file() and target.read_bytes() == content and target.stat().st_mode & 0o7777 == _MODE:
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)  # a dot: AppArmor skips it
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, _MODE)
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        Path(name).replace(target)
    except BaseException:
        Path(name).unlink()
        raise
    return True
