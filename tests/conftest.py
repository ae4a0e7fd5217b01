"""What is shared by tests of several kinds: the booted machines, and the time that an image takes to be made."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "vm"))

import machines as vm

IMAGE_WITHIN = 1800  # seconds: whichever test comes first waits for the images to be made
WAITING = [Path(__file__).parent / kind for kind in ("backends", "container")]


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent in WAITING:
            item.add_marker(pytest.mark.timeout(IMAGE_WITHIN))


@pytest.fixture(scope="session", autouse=True)
def machines(request, tmp_path_factory):
    """A function that returns a Debian's machine after its end; those that this run wants are booted side by side.

    They run from the first test on: they take longest, and other tests wait much of the time.
    """
    here = Path(vm.__file__).parent
    wanted = {item.callspec.params["debian"] for item in request.session.items if item.path.parent == here}
    with vm.running(sorted(wanted), tmp_path_factory.mktemp("machines")) as ended:
        yield ended
