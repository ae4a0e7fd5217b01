"""What is shared by tests of several kinds: the booted machines."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "vm"))

import machines as vm


@pytest.fixture(scope="session")
def machines(request, tmp_path_factory):
    """A function that returns a Debian's machine after its end; those that this run wants are booted side by side."""
    here = Path(vm.__file__).parent
    wanted = {item.callspec.params["debian"] for item in request.session.items if item.path.parent == here}
    with vm.running(sorted(wanted), tmp_path_factory.mktemp("machines")) as ended:
        yield ended
