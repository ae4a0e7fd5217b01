"""Fixtures of every hostile test: the apps that attack, and the one that is attacked."""

import pytest
from running_pair import simple_app
from target import CANARY, READY, compiled, deploy_shell, packed

NEIGHBOUR = """
writeLines("{canary}", "/tmp/secret")
Sys.setenv(APP_SECRET = "{canary}")
system("sleep 100000", wait = FALSE)
"""


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="session")
def neighbours_visitor(target):
    """A visitor of the neighbour with one session for all tests: an address may not begin one for each attack."""
    found = target.server.visitor()
    found.http.timeout = READY
    return found


@pytest.fixture(scope="session")
def neighbour(target, neighbours_visitor):
    """Another tenant's app with secrets in its bundle, its /tmp and its environment; its bundle's name and worker."""
    files = {**simple_app(NEIGHBOUR.format(canary=CANARY)), "secret.txt": CANARY}
    made = target.server.deploy("neighbour", packed(files), max_sessions_per_worker=100, max_workers_per_app=1)
    assert neighbours_visitor.get("/app/neighbour/").status_code == 200
    return made["bundle_id"], target.worker("neighbour")


@pytest.fixture
def neighbour_lives_on(target, neighbour, neighbours_visitor):
    yield
    assert target.worker("neighbour") == neighbour[1]
    assert neighbours_visitor.get("/app/neighbour/").status_code == 200


@pytest.fixture(scope="session")
def shell(target, program):
    """The hostile app."""
    found = deploy_shell(target, "hostile", program, network="none")
    assert "attack" in found.run("ls /tmp")
    return found
