"""A worker as the description of a container. Pure: to read this is to read what a Docker worker can see and do."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from blockyard_spawner import sandbox
from blockyard_spawner.docker.config import SUBNET, runtime
from blockyard_spawner.policy import Launch

USER = 65534  # nobody, in every image
LABEL = "dev.blockyard"
PROGRAMS = str(pathlib.Path(sandbox.__file__).with_name("sandboxed"))
SWAPPED = 117  # the exit status for a mount that is not what was checked
_SHM = 64 << 20
_LOG = {"max-size": "5m", "max-file": "2"}
_SWEEP = "timeout -k1 30 chmod -R u+rwx /run/worker; timeout -k1 30 find /run/worker -mindepth 1 -delete"


def labels(config: Mapping[str, Any], worker: str, app: str) -> dict[str, str]:
    """Name whose a container or a network is: several installations may share an engine."""
    installation = config["storage.state_dir"]
    return {f"{LABEL}/installation": installation, f"{LABEL}/worker": worker, f"{LABEL}/app": app}


def described(
    config: Mapping[str, Any], launch: Launch, network: str, marks: Sequence[str], log_driver: str
) -> dict[str, Any]:
    """Build the body of the engine's "create"; `marks` are the identities of the launch's sources, in their order."""
    request, limits = launch.request, launch.limits
    mounts = [
        _bind(PROGRAMS, sandbox.PLACE),
        _bind(f"{config['docker.runtime_dir']}/{request.id}", "/run/worker", True),
    ]
    mounts += [_bind(_path(source.root, source.name), source.target, source.writable) for source in launch.sources]
    program = sandbox.command("R", request.kind)
    checked = [f"{source.target}={mark}" for source, mark in zip(launch.sources, marks, strict=True)]
    return {
        "Image": config["docker.image"],
        "Entrypoint": ["/bin/sh", f"{sandbox.PLACE}/enter.sh"],
        "Cmd": [launch.directory, *checked, "--", *program],
        # A name without a value takes away what the engine would set.
        "Env": [*(f"{name}={value}" for name, value in launch.env.items()), "HOSTNAME"],
        "WorkingDir": "/",
        "Healthcheck": {"Test": ["NONE"]},
        **_confined(config, request.id, request.app),
        "HostConfig": {
            **_bounded(log_driver),
            "Runtime": runtime(config, request.access),
            "NetworkMode": network,
            "Mounts": mounts,
            "Tmpfs": {"/tmp": f"rw,exec,nosuid,nodev,mode=1777,size={limits.tmp}"},  # noqa: S108
            "Memory": limits.memory or 0,
            "MemorySwap": limits.memory or 0,  # memory and swap together: no swap
            "NanoCpus": (limits.cpu or 0) * 1_000_000,
            "PidsLimit": limits.pids,
        },
    }


def sweeping(config: Mapping[str, Any], worker: str) -> dict[str, Any]:
    """Describe a container that empties a worker's directory as the worker's user, who made what is in it."""
    return {
        "Image": config["docker.image"],
        "Entrypoint": ["/bin/sh", "-c", _SWEEP],
        "WorkingDir": "/",
        **_confined(config, worker, ""),
        "HostConfig": {
            **_bounded("none"),
            "NetworkMode": "none",
            "Mounts": [_bind(f"{config['docker.runtime_dir']}/{worker}", "/run/worker", True)],
            "Memory": 256 << 20,
            "MemorySwap": 256 << 20,
            "PidsLimit": 64,
        },
    }


def network(config: Mapping[str, Any], worker: str, app: str, subnet: str) -> dict[str, Any]:
    """Describe a worker's own network. Its containers may talk only where sidecars are to be reached in it."""
    sidecars = bool(config["docker.service_network"])
    return {
        "Name": network_name(worker),
        "CheckDuplicate": True,
        "Driver": "bridge",
        "EnableIPv6": False,  # whatever the engine's own default: the firewall's rules for the pool are of IPv4
        "IPAM": {"Config": [{"Subnet": subnet}]},
        "Options": {"com.docker.network.bridge.enable_icc": str(sidecars).lower()},
        "Labels": labels(config, worker, app),
    }


def network_name(worker: str) -> str:
    """Name a worker's own network."""
    return f"blockyard-{worker}"


def subnets(config: Mapping[str, Any]) -> list[str]:
    """List the parts of the pool, one for each worker."""
    return [str(part) for part in config["docker.network_pool"].subnets(new_prefix=SUBNET)]


def _confined(config: Mapping[str, Any], worker: str, app: str) -> dict[str, Any]:
    return {"User": f"{USER}:{USER}", "Hostname": "worker", "Labels": labels(config, worker, app)}


def _bounded(log_driver: str) -> dict[str, Any]:
    """Say what no container of ours may, whatever it runs. Where no seccomp filter is named, the engine's own is on."""
    return {
        "ReadonlyRootfs": True,
        "CapDrop": ["ALL"],
        "SecurityOpt": ["no-new-privileges"],
        "Init": True,  # reaps, and passes the interrupt on
        "IpcMode": "private",
        "ShmSize": _SHM,
        "Ulimits": [{"Name": "nofile", "Soft": 4096, "Hard": 4096}, {"Name": "core", "Soft": 0, "Hard": 0}],
        "RestartPolicy": {"Name": "no"},
        "LogConfig": {"Type": log_driver, "Config": {} if log_driver == "none" else _LOG},
    }


def _bind(source: str, target: str, writable: bool = False) -> dict[str, Any]:  # noqa: FBT001, FBT002 - of one table
    return {"Type": "bind", "Source": source, "Target": target, "ReadOnly": not writable}


def _path(root: str, name: str) -> str:
    return root if name == "." else f"{root}/{name}"
