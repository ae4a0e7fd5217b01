"""Where the state is kept: the directories, and the database among them."""

from pathlib import Path

from blockyard_api.settings import Settings


def prepare_state(state_dir: Path) -> None:
    """Make the directories below the state directory, with their modes.

    A worker's uid passes through those with 0711 and lists none of them (facts: bwrap resolves a descriptor's path as
    the worker's uid); the names below are unguessable.
    """
    modes = {"": 0o711, "bundles": 0o711, "libraries": 0o711, "uploads": 0o700, "logs": 0o700}
    for name, mode in modes.items():
        directory = state_dir / name
        directory.mkdir(mode=mode, exist_ok=True)
        directory.chmod(mode)  # UMask= has masked what mkdir was told


def database_path(settings: Settings) -> Path:
    """Return where the database is."""
    return Path(settings.database.path or f"{settings.storage.state_dir}/blockyard.db")
