"""The image that holds the pair, and containers of it in an engine of the tests' own."""

import itertools
import json
import os
import re
import shlex
import subprocess
import time
from pathlib import Path
from typing import Any, Self

from running_engine import CHECKOUT, Dockerd

IMAGE = "blockyard:0.1.0"
BUILD = CHECKOUT / "scripts/build-image"
DEADLINE = 180.0
NETWORK = "blockyard-container-test"
_numbers = itertools.count(1)


def pair_image() -> Path:
    """Return the image's file."""
    script = Path(__file__).with_name("pair-image")
    return Path(subprocess.run([script], stdout=subprocess.PIPE, text=True, check=True, timeout=1800).stdout.strip())


class Engine(Dockerd):
    """A dockerd with the pair's image and no other, and a network to publish ports of."""

    def import_image(self) -> None:
        environment = {**os.environ, "DOCKER_HOST": f"unix://{self.socket}"}
        command = [BUILD, "--name", IMAGE, "--from", pair_image()]
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, timeout=300)
        self.run("network", "create", NETWORK)


def documented(profile: Path) -> list[str]:
    """Return the options of the command that docs/container.md starts a container with."""
    page = (CHECKOUT / "docs/container.md").read_text()
    (command,) = re.findall(r"^    docker run --detach (.*?)blockyard:0\.1\.0$", page, re.DOTALL | re.MULTILINE)
    command = command.replace("\\\n", " ").replace("/etc/blockyard/seccomp.json", str(profile))
    options = shlex.split(command)
    assert options[:2] == ["--name", "blockyard"]
    return options[2:]


class Container:
    """One container of the pair."""

    def __init__(self, engine: Dockerd, options: list[str] | tuple[str, ...], name: str = "") -> None:
        self.engine, self.options = engine, options
        self.name = name or f"pair{next(_numbers)}"
        self.run()

    def run(self) -> None:
        self.engine.run("run", "--detach", "--name", self.name, "--network", NETWORK, *self.options, IMAGE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        self.engine.run("rm", "--force", "--volumes", self.name, check=False)

    def state(self) -> dict[str, Any]:
        return self.engine.show(self.name)["State"]

    def log(self) -> str:
        done = self.engine.run("logs", self.name)
        return done.stdout + done.stderr

    def wait_for_end(self) -> int:
        """Wait until it has ended by itself; return its status."""
        self.wait_for(lambda: not self.state()["Running"])
        return self.state()["ExitCode"]

    def wait_for(self, condition) -> Any:
        end = time.monotonic() + DEADLINE
        while not (found := condition()):
            assert time.monotonic() < end, self.log()
            time.sleep(0.2)
        return found

    def inside(self, script: str, user: str = "blockyard", check: bool = True) -> str:
        """Run a shell's words in it."""
        done = self.engine.run("exec", "--user", user, "--env", "HOME=/tmp", self.name, "sh", "-c", script, check=False)
        assert not check or done.returncode == 0, done.stdout + done.stderr + self.log()
        return done.stdout

    def wait_until_served(self) -> None:
        """Wait until the start-up checks are over and the API answers."""
        ask = "python3 -c 'import urllib.request as r; r.urlopen(\"http://127.0.0.1:8080/healthz\", timeout=60)'"
        end = time.monotonic() + DEADLINE
        while self.engine.run("exec", self.name, "sh", "-c", ask, check=False).returncode:
            assert self.state()["Running"], self.log()
            assert time.monotonic() < end, self.log()
            time.sleep(1)

    def deploy_hello(self) -> None:
        self.log_in()
        self.inside("by deploy --name hello --yes --wait /opt/blockyard/examples/hello")
        self.inside("by update hello --access public")

    def log_in(self) -> None:
        token = "$(cat /var/lib/blockyard/admin-token)"
        self.inside(f'by login --server http://127.0.0.1:8080 --token "{token}"')

    def page(self) -> str:
        """Get the app's page as a browser on the engine's host does, at the published port."""
        return self._visit("--output", "-")

    def seconds_to_first_byte(self) -> float:
        """Visit the app there; return how long its page took to begin."""
        return float(self._visit("--fail", "--output", "/dev/null", "--write-out", "%{time_starttransfer}"))

    def _visit(self, *options: str) -> str:
        argv = ["nsenter", f"--net={self.engine.root}/net", "curl", "--silent", "--show-error", "--max-time", "60"]
        address = "http://127.0.0.1:8081/app/hello/"
        done = subprocess.run([*argv, *options, address], check=False, capture_output=True, text=True, timeout=90)
        assert done.returncode == 0, done.stderr + self.log()
        return done.stdout

    def page_from_inside(self) -> str:
        ask = 'import urllib.request as r; print(r.urlopen("http://127.0.0.1:8081/app/hello/", timeout=60).read())'
        return self.inside(f"python3 -c '{ask}'")

    def checks(self) -> dict[str, dict[str, str]]:
        """Run the start-up checks again; return them by name."""
        found = json.loads(self.inside("by admin check --json", check=False))
        return {check["name"]: check for check in found["checks"]}

    def processes(self) -> dict[int, dict[str, str]]:
        """Name the container's processes, with the fields of proc_pid_status(5)."""
        text = self.inside("for p in /proc/[0-9]*; do cat $p/status 2>/dev/null; echo; done", user="root")
        found = {}
        for block in text.split("\n\n"):
            fields = dict(line.split(":\t", 1) for line in block.strip().splitlines() if ":\t" in line)
            if fields:
                found[int(fields["Pid"])] = fields
        return found

    def pid_of(self, name: str) -> int | None:
        found = [pid for pid, fields in self.processes().items() if fields["Name"] == name]
        return found[0] if found else None
