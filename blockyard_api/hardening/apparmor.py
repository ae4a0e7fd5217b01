"""AppArmor: the profile under which the spawner's children may make user namespaces."""

import contextlib
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from blockyard_api.hardening.placing import put

PROFILE = "blockyard"  # systemd/blockyard-spawner.service names it
TARGET = Path("/etc/apparmor.d/blockyard")
POLICY = Path(__file__).with_name("apparmor.profile")
PARSER = "apparmor_parser"

_SBIN = "/usr/sbin:/sbin"  # not in every administrator's PATH
_PARSED_WITHIN = 60.0  # seconds
_ENABLED = "sys/module/apparmor/parameters/enabled"
_SECURITY = "sys/kernel/security/apparmor"


@dataclass(frozen=True, slots=True)
class Installed:
    """What `install` did: whether the file is new or changed, whether the kernel has it now, and what to know."""

    target: Path
    changed: bool
    loaded: bool
    warnings: tuple[str, ...]


def install(target: Path = TARGET, *, parser: str | None = None, root: Path = Path("/")) -> Installed:
    """Write the profile, have the parser check it, and load it where the kernel has AppArmor.

    A parser that does not accept it is a warning: one before version 4 does not know `userns`, and neither does a
    kernel of its time. Such a file is linked into ``disable/``, else it would fail the start of apparmor.service.
    `root` is where /sys is below. Raises OSError where the file cannot be written.
    """
    changed = put(target, POLICY.read_bytes())
    disabled = target.parent / "disable" / target.name
    parser = parser or shutil.which(PARSER, path=f"{os.environ.get('PATH', os.defpath)}:{_SBIN}")
    if parser is None:
        return Installed(target, changed, False, ("apparmor_parser is not installed: the profile was not checked.",))
    if disabled.is_symlink() and disabled.resolve() == target.resolve():  # ours, from when the parser was older
        disabled.unlink()
    if complaint := _complaint(parser, "-QT", target):
        with contextlib.suppress(FileExistsError):
            disabled.parent.mkdir(exist_ok=True)
            disabled.symlink_to(f"../{target.name}")
        return Installed(target, changed, False, (f"apparmor_parser does not accept it: {complaint}", _too_old(root)))
    if not enabled(root):
        return Installed(target, changed, False, ("The kernel runs without AppArmor: the profile does nothing here.",))
    if target.parent != TARGET.parent:
        return Installed(target, changed, False, (f"Not loaded: AppArmor reads {TARGET.parent} alone.",))
    complaint = _complaint(parser, "-r", target)
    warnings = (f"The kernel did not take it: {complaint}",) if complaint else ()
    return Installed(target, changed, not complaint, warnings)


def enabled(root: Path = Path("/")) -> bool:
    """Tell whether the kernel runs with AppArmor."""
    return _read(root / _ENABLED) == "Y"


def mediates_user_namespaces(root: Path = Path("/")) -> bool:
    """Tell whether a profile can forbid user namespaces: kernels from 6.7 on."""
    return enabled(root) and "userns_create" in _read(root / _SECURITY / "features/namespaces/mask")


def _too_old(root: Path) -> str:
    if mediates_user_namespaces(root):
        return "This kernel asks AppArmor about user namespaces: workers may need a parser of version 4 or later."
    return (
        "Nothing is lacking: this kernel does not ask AppArmor about user namespaces. The file stays, disabled; run "
        "this again after an upgrade of the system."
    )


def _complaint(parser: str, action: str, target: Path) -> str:
    """Return what the parser says against the profile, or ""."""
    done = subprocess.run(
        [parser, action, str(target)],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_PARSED_WITHIN, check=False,
    )  # fmt: skip
    if done.returncode == 0:
        return ""
    lines = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()
    return next((line for line in lines if "error" in line.lower()), lines[-1])


def _read(path: Path) -> str:
    """Return what a file of the kernel says, "" where there is none to be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
