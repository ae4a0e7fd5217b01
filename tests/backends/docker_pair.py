"""A real API with both helpers behind it."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Self

sys.path.insert(0, str(Path(__file__).parents[1] / "host" / "api"))

from docker_helper import engine_group, helper_user
from running_engine import Dockerd
from running_pair import Pair, wait_for


class DockerPair(Pair):
    """A pair, and a Docker helper beside the root one."""

    def __init__(self, name: str, engine: Dockerd, settings: str = "", pool: str = "10.213.16.0/24") -> None:
        self.engine = engine
        self.docker = None
        # A container that starts beside two emulated machines may need more than the usual six seconds of a probe.
        super().__init__(name, f'server.preflight_timeout = "40s"\n{settings}')
        helper = helper_user()
        self.docker_runtime, control = self.root / "docker", self.root / "docker-control"
        self.docker_socket = control / "spawner.sock"
        for directory in (self.docker_runtime, control):
            directory.mkdir()
            os.chown(directory, helper.pw_uid, self.user.pw_gid)
            directory.chmod(0o2710)
        own = f'socket = "{engine.socket}"\nruntime_dir = "{self.docker_runtime}"\nnetwork_pool = "{pool}"\n'
        own += f'spawner_socket = "{self.docker_socket}"\n'
        text = self.config.read_text()
        head, _, tail = text.partition("[docker]\n")
        self.config.write_text(f"{head}[docker]\n{own}{tail}")
        self.logs["docker"] = (self.root / "docker.log").open("ab")

    def __enter__(self) -> Self:
        self.start_docker()
        return super().__enter__()

    def start_docker(self) -> None:
        user = helper_user()
        argv = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", f"--groups={engine_group()}"]
        argv += ["--no-new-privs", "--bounding-set=-all", "--inh-caps=-all", sys.executable]
        argv += ["-m", "blockyard_spawner.docker.main", "--config", str(self.config), "--socket", self.docker_socket]
        self.docker_socket.unlink(missing_ok=True)
        self.docker = subprocess.Popen(argv, stdout=self.logs["docker"], stderr=self.logs["docker"], cwd="/")
        wait_for(self.docker_socket.exists, what="the Docker helper's socket")

    @property
    def _ours(self) -> str:
        return f"label=dev.blockyard/installation={self.state}"

    def containers(self) -> list[str]:
        return self.engine.containers(self._ours)

    def docker_leftovers(self) -> list[str]:
        directories = [path.name for path in self.docker_runtime.iterdir()]
        return [*self.containers(), *self.engine.networks(self._ours), *directories]

    def __exit__(self, *_: object) -> None:
        for process in (self.api, self.docker):
            if process is not None and process.poll() is None:
                process.kill()
                process.wait(20)
        if left := self.containers():
            self.engine.run("rm", "--force", *left)
        for network in self.engine.networks(self._ours):
            self.engine.run("network", "rm", network, check=False)
        super().__exit__()
