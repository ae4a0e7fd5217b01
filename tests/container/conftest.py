"""Fixtures: an engine of the tests' own with the image that holds the pair, and containers made of it."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "backends"))

from running_container import Container, Engine, documented

BY = Path(sys.executable).with_name("by")


@pytest.fixture(scope="session")
def container_engine() -> Iterator[Engine]:
    with Engine(0) as running:
        yield running


@pytest.fixture(scope="session")
def profile(tmp_path_factory) -> Path:
    """The container's system call profile, as an operator makes it."""
    target = tmp_path_factory.mktemp("profile") / "seccomp.json"
    subprocess.run([BY, "admin", "install-seccomp", "--outer", "--target", target], check=True, timeout=60)
    return target


@pytest.fixture(scope="module")
def start(container_engine, profile) -> Iterator[Callable[..., Container]]:
    """Start a container with options; each is removed in the end."""
    made = []

    def start(*options: str) -> Container:
        made.append(Container(container_engine, options))
        return made[-1]

    yield start
    for container in made:
        container.remove()


@pytest.fixture(scope="module")
def pair(container_engine, profile) -> Iterator[Container]:
    """The container that docs/container.md starts, with the app hello in it."""
    with Container(container_engine, documented(profile), name="blockyard") as container:
        container.wait_until_served()
        container.deploy_hello()
        yield container
    container_engine.run("volume", "rm", "--force", "blockyard-state")
