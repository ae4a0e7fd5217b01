"""`scripts/test`, with stand-ins for what it installs and for pytest: how it ends, and what it leaves."""

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "test"


@pytest.fixture
def run(tmp_path):
    """Start `scripts/test` where pytest is a given program."""
    venv, scripts, temporary = (tmp_path / name for name in ("venv", "scripts", "temporary"))
    for directory in (venv / "bin", scripts, temporary, tmp_path / "blockyard_api", tmp_path / "blockyard_spawner"):
        directory.mkdir(parents=True)
    text = SCRIPT.read_text().replace("/opt/blockyard-test/venv", str(venv))
    placed(scripts / "test", re.sub(r"^\(\(EUID == 0\)\).*\n", "", text, flags=re.MULTILINE))
    placed(scripts / "install-packages", f'#!/bin/sh\ncat "$2" >{tmp_path}/wanted\n')
    placed(venv / "bin/pip", "#!/bin/sh\n")
    for name in ("scripts/packages.txt", "scripts/packages-test.txt", "pyproject.toml", "README.md"):
        (tmp_path / name).write_text(f"{name}\n")

    def start(pytest):
        placed(venv / "bin/pytest", f"#!/bin/sh\n{pytest}\n")
        environ = os.environ | {"TMPDIR": str(temporary)}
        return subprocess.Popen([scripts / "test", "tests/unit"], env=environ, stdout=subprocess.PIPE, text=True)

    return start


def placed(path, program):
    path.write_text(program)
    path.chmod(0o755)


def test_it_ends_as_pytest_does_and_leaves_no_file(run, tmp_path):
    done = run('echo "1 failed"\nexit 3')
    printed, _ = done.communicate(timeout=60)
    assert printed.splitlines()[-1] == "1 failed"
    assert done.returncode == 3
    assert (tmp_path / "wanted").read_text() == "scripts/packages.txt\nscripts/packages-test.txt\n"
    assert list((tmp_path / "temporary").iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_for_it_is_pytests(run, number):
    with run("echo runs\nexec sleep 60") as running:
        assert "runs\n" in running.stdout
        running.send_signal(number)
        assert running.wait(20) == -number
