"""`by`, in the tests' own process, and a server for it."""

import sys

import pytest
from fake_server import fake_server

from blockyard_api.cli.main import main


@pytest.fixture
def server():
    with fake_server() as answers:
        yield answers


@pytest.fixture
def by(server, monkeypatch, tmp_path, capsys):
    """Run `by` as a user whose environment names server and token; return his standard streams."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("BLOCKYARD_URL", server.url)
    monkeypatch.setenv("BLOCKYARD_TOKEN", "by_token")

    def run(*arguments, status=0):
        monkeypatch.setattr(sys, "argv", ["by", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        assert (ended.value.code or 0) == status, printed
        return printed

    return run


@pytest.fixture
def app(tmp_path, monkeypatch):
    """Be in the directory of an app that is called hello."""
    (tmp_path / "hello").mkdir()
    (tmp_path / "hello/app.R").write_text("")
    monkeypatch.chdir(tmp_path / "hello")
