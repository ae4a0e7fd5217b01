"""The sandbox's argument list, word for word: a change of policy is a visible change of the golden files."""

from pathlib import Path

import pytest
from test_policy import configured, request

from blockyard_spawner import policy, sandbox
from blockyard_spawner.config import DataMount
from blockyard_spawner.protocol import Limits

GOLDEN = Path(__file__).parent / "golden"
CONFIG = configured(
    storage__data_mounts={
        "ro": DataMount("ro", "/srv/ro", writable=False),
        "rw": DataMount("rw", "/srv/rw", writable=True),
    },
    process__seccomp_profile="/usr/lib/blockyard/seccomp.bpf",
)
FULL = {"library": "l1", "data": ("ro", "rw"), "network": "none", "limits": Limits(tmp=1 << 20), "scratch_copy": True}


def argv(config, lasting=True, **fields):
    launch = policy.authorize(config, request(**fields))
    return sandbox.bwrap_argv(
        config, launch, sandbox.files(config, 60000, launch.request.kind, b"program"), lasting=lasting
    )


@pytest.mark.parametrize(("name", "config", "fields"), [("plain", configured(), {}), ("full", CONFIG, FULL)])
def test_the_arguments_are_the_golden_ones(name, config, fields):
    assert argv(config, **fields) == (GOLDEN / f"{name}.txt").read_text().splitlines()


@pytest.mark.parametrize(("config", "fields"), [(configured(), {}), (CONFIG, FULL)])
def test_no_destination_lies_below_a_bind(config, fields):
    words = argv(config, **fields)
    words = words[: words.index("--")]
    binds = [words[at + 2] for at, word in enumerate(words) if word.startswith(("--bind", "--ro-bind"))]
    places = binds + [words[at + 2] for at, word in enumerate(words) if word in ("--file", "--symlink")]
    places += [words[at + 1] for at, word in enumerate(words) if word in ("--tmpfs", "--dev", "--proc")]
    assert len(binds) > 10
    assert not [(bind, place) for bind in binds for place in places if place.startswith(bind + "/")]
    assert len(set(places)) == len(places)


def test_the_root_is_made_read_only_last():
    words = argv(configured())
    words = words[: words.index("--")]
    remount = next(at for at in range(len(words)) if words[at : at + 2] == ["--remount-ro", "/"])
    assert not [word for word in words[remount + 1 :] if word.startswith(("--bind", "--ro-bind", "--tmpfs", "--file"))]


def test_a_worker_that_no_cgroup_holds_ends_with_its_parent():
    assert "--die-with-parent" not in argv(configured())
    assert "--die-with-parent" in argv(configured(), lasting=False)


def test_an_empty_setting_leaves_out_the_filter_and_nothing_else():
    without = argv(configured(process__seccomp_profile=""))
    filtered = argv(configured())
    at = filtered.index("--seccomp")
    assert without == filtered[:at] + filtered[at + 2 :]
