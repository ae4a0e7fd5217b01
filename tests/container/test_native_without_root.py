"""The row of docs/container.md's table that is no container: an ordinary user's spawner, in a cgroup of its own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "host"))

from running_spawner import api_user, configured_spawner

RULES = """
table inet t {{
    chain output {{
        type filter hook output priority filter;
        meta l4proto tcp socket cgroupv2 level {level} "{path}" counter comment "by cgroup"
        meta l4proto tcp meta skuid {pool} counter comment "by owner"
    }}
}}
"""
# In a network of its own, with loopback, and in a leaf of the delegated cgroup, as systemd would start it.
START = """
echo $$ > "$1/daemons/cgroup.procs"
shift
exec unshare --net sh -c 'ip link set lo up && exec "$@"' sh "$@"
"""


@pytest.fixture
def spawner():
    """A spawner of an ordinary user, whose cgroup is delegated to that user."""
    made, user = configured_spawner(), api_user()
    delegated = made.cgroup_root
    (delegated / "daemons").mkdir()
    os.chown(made.root, user.pw_uid, user.pw_gid)
    for path in (delegated, delegated / "cgroup.procs", delegated / "cgroup.subtree_control"):
        os.chown(path, user.pw_uid, user.pw_gid)
    for path in ((delegated / "daemons"), (delegated / "daemons/cgroup.procs")):
        os.chown(path, user.pw_uid, user.pw_gid)
    drop = ("setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups")
    made.prefix = ("sh", "-c", START, "sh", str(delegated), *drop)
    made.arguments = ("--socket", str(made.socket), "--unprivileged")
    yield made
    made.remove()


def test_without_root_but_with_delegation_workers_are_told_by_their_cgroup_and_not_by_their_owner(spawner):
    spawner.start()
    client = spawner.client(greet=False)
    assert client.hello()["unprivileged"] is True
    user = api_user()
    enter = ["nsenter", f"--net=/proc/{spawner.process.pid}/ns/net"]
    workers = (spawner.cgroup_root / "workers").relative_to(spawner.cgroup_root.parent)
    pool = f"{spawner.uids.start}-{spawner.uids.stop - 1}"
    rules = RULES.format(level=len(workers.parts), path=workers, pool=pool)
    # nft looks for cgroups at one place alone, wherever this machine has them.
    there = f"mount --bind {spawner.cgroup_root.parent} /sys/fs/cgroup && exec nft -f -"
    loaded = [*enter, "unshare", "--mount", "--propagation", "private", "sh", "-c", there]
    subprocess.run(loaded, input=rules, text=True, check=True, timeout=30)

    attempt = 'try(socketConnection("127.0.0.1", 9, timeout = 2), silent = TRUE); quit()'
    worker = spawner.run_r(client, "worker0001", attempt, network="host")
    spawner.result(client, "worker0001")
    assert worker.cgroup.endswith("/workers/worker0001")
    assert worker.uid == user.pw_uid  # the API's own: a rule by owner would cut the API off
    counted = subprocess.run(
        [*enter, shutil.which("nft"), "list", "ruleset"], check=True, capture_output=True, text=True
    )
    (by_cgroup,) = [line for line in counted.stdout.splitlines() if "by cgroup" in line]
    (by_owner,) = [line for line in counted.stdout.splitlines() if "by owner" in line]
    assert "packets 0 " not in by_cgroup
    assert "packets 0 " in by_owner
