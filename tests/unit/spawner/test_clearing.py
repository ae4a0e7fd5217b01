"""What the kernel may say in the middle of a worker's end."""

import errno
import time

import pytest

from blockyard_spawner import workers
from blockyard_spawner.config import KEYS
from blockyard_spawner.workers import Worker, Workers

AWAY = OSError(errno.ENODEV, "No such device")


@pytest.fixture
def emptied(tmp_path, monkeypatch):
    """Workers whose cgroups answer as they are told to."""
    monkeypatch.setattr(workers, "_RETRY_SECONDS", 0.05)
    config = {name: key.default for name, key in KEYS.items()}
    config |= {"process.seccomp_profile": "", "process.runtime_dir": str(tmp_path / "run")}
    return Workers(config, 0, unprivileged=True)


async def test_a_cgroup_that_is_removed_while_it_is_looked_at_is_looked_for_again_without_haste(
    emptied, monkeypatch, capsys
):
    answers = iter([AWAY, AWAY, AWAY, FileNotFoundError()])

    async def end(name):
        raise next(answers)

    monkeypatch.setattr(emptied._cgroups, "end", end)
    began = time.monotonic()
    assert await emptied._clear(Worker("worker0001", "an-app", 70000)) == 0
    assert time.monotonic() - began > 3 * 0.05
    assert "quarantined" not in capsys.readouterr().err  # it is the operator's emergency stop
