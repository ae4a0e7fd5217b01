"""A real Docker helper in a directory of its own, with what the tests of the root helper do to theirs."""

import contextlib
import fcntl
import grp
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from running_engine import Dockerd
from running_spawner import Spawner, api_user, eventually

HELPER_USER = "blockyard-docker-test"


def helper_user() -> pwd.struct_passwd:
    """Return the user that the helper runs as, made if missing; its group is that of the engine's socket."""
    with contextlib.suppress(KeyError):
        return pwd.getpwnam(HELPER_USER)
    command = ["useradd", "--system", "--user-group", "--no-create-home", "--shell", "/usr/sbin/nologin", HELPER_USER]
    subprocess.run(command, check=True)
    return pwd.getpwnam(HELPER_USER)


def engine_group() -> int:
    with contextlib.suppress(KeyError):
        return grp.getgrnam("blockyard-engine-test").gr_gid
    subprocess.run(["groupadd", "--system", "blockyard-engine-test"], check=True)
    return grp.getgrnam("blockyard-engine-test").gr_gid


class DockerHelper(Spawner):
    """A running Docker helper: an ordinary user without a capability, in the group of the engine's socket."""

    def __init__(self, engine: Dockerd, pool: str = "10.213.0.0/24") -> None:
        root = Path(tempfile.mkdtemp(prefix="blockyard-"))
        root.chmod(0o711)
        super().__init__(root, range(0), root, {})
        self.module = "blockyard_spawner.docker.main"
        self.engine = engine
        self.groups = (engine_group(),)
        self.manager = None  # what keeps the listener and descriptors over a restart
        user, helper = api_user(), helper_user()
        for name in ("bundles", "libraries"):
            (self.state_dir / name).mkdir(parents=True)
        for directory in (self.state_dir, *self.state_dir.iterdir()):
            directory.chmod(0o711)
            os.chown(directory, user.pw_uid, user.pw_gid)
        for directory in (self.runtime_dir, self.socket.parent):
            directory.mkdir()
            os.chown(directory, helper.pw_uid, user.pw_gid)
            directory.chmod(0o2710)
        self.docker = {"socket": str(engine.socket), "runtime_dir": str(self.runtime_dir), "network_pool": pool}
        self.configure(api_user=user.pw_name)

    @property
    def socket(self) -> Path:
        return self.root / "control" / "spawner.sock"

    def configure(self, tables: str = "", docker: dict[str, object] | None = None, **settings: object) -> None:
        """Write the configuration; `docker` holds keys of [docker]."""
        self.docker |= docker or {}
        body = (tables or self.tables).split("[docker]")[0]
        lines = "\n".join(f"{name} = {_toml(value)}" for name, value in self.docker.items())
        super().configure(f"{body}[docker]\n{lines}\n", **settings)

    def start(self) -> None:
        user = helper_user()
        self.prefix = (
            "setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}",
            f"--groups={','.join(map(str, self.groups))}" if self.groups else "--clear-groups",
            "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all",
        )  # fmt: skip
        if not self.manager:
            super().start()
            return
        passed = self.manager.passed()
        high = [fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, 200) for _, number in passed]

        def arrange() -> None:
            for target, number in enumerate(high, 3):
                os.dup2(number, target)
                os.set_inheritable(target, True)

        environment = {**os.environ, **self.manager.environment, "LISTEN_FDS": str(len(passed))}
        environment["LISTEN_FDNAMES"] = ":".join(name for name, _ in passed)
        argv = [*self.prefix, "sh", "-c", 'LISTEN_PID=$$ exec "$@"', "sh", sys.executable, "-m", self.module]
        with (self.root / "audit.jsonl").open("ab") as audit:
            self.process = subprocess.Popen(
                [*argv, "--config", str(self.config)],
                stderr=audit, cwd="/", env=environment, preexec_fn=arrange, close_fds=False,  # noqa: PLW1509
            )  # fmt: skip
        for number in high:
            os.close(number)
        eventually(lambda: self.process.poll() is not None or self._accepts(), "the helper starts", self.audit_text)
        assert self.process.poll() is None, self.audit_text()

    def leftovers(self) -> dict[str, list[str]]:
        ours = f"label=dev.blockyard/installation={self.state_dir}"
        left = {
            "containers": self.engine.containers(ours),
            "networks": self.engine.networks(ours),
            "directories": [path.name for path in self.runtime_dir.iterdir() if path.is_dir()],
        }
        return {name: found for name, found in left.items() if found}

    def remove(self) -> None:
        if self.process and self.process.poll() is None:
            self.end(signal.SIGKILL)
        ours = f"label=dev.blockyard/installation={self.state_dir}"
        with contextlib.suppress(AssertionError):
            if left := self.engine.containers(ours):
                self.engine.run("rm", "--force", "--volumes", *left)
            for network in self.engine.networks(ours):
                self.engine.run("network", "rm", network, check=False)
        shutil.rmtree(self.root)
        for worker in self.workers:
            os.close(worker.pidfd)

    def container_of(self, worker: str) -> dict:
        return self.engine.show(f"blockyard-{worker}")


def _toml(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {_toml(item)}" for name, item in value.items()) + "}"
    return json.dumps(value)


__all__ = ["DockerHelper", "engine_group", "eventually", "helper_user"]
