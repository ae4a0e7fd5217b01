"""systemd over D-Bus: start a dead spawner again, and read what the workers' unit may use and does."""

import asyncio
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockyard_api.errors import BlockyardError

SPAWNER = "blockyard-spawner.service"
WORKERS = "blockyard-workers.service"

_BUS = Path("/run/dbus/system_bus_socket")
_SYSTEMD = "org.freedesktop.systemd1"
_UNLIMITED = 2**64 - 1
_WITHIN = 5.0  # seconds

log = logging.getLogger(__name__)


class SystemdRefused(BlockyardError):
    """systemd, or polkit before it, did not do what it was asked."""


@dataclass(frozen=True, slots=True)
class WorkersUnit:
    """The unit that holds all workers: its ceilings and present use; None where there is no ceiling or no number."""

    control_group: str
    memory_max: int | None  # bytes
    memory_current: int | None  # bytes
    tasks_max: int | None
    tasks_current: int | None
    cpu_quota: float | None  # cores
    delegated: bool


async def _call(*calls: tuple[str, str, str, str, list[str]]) -> list[Any]:
    """Make calls (path or "" for the last answer's, interface, member, signature, arguments); return their answers.

    Raises SystemdRefused, also where there is no bus.
    """
    # 12 MB resident: only a server that has to do with systemd pays for it
    from dbus_next import BusType, Message, MessageType  # noqa: PLC0415
    from dbus_next.aio import MessageBus  # noqa: PLC0415
    from dbus_next.errors import AuthError, DBusError  # noqa: PLC0415

    answers: list[Any] = []
    try:
        async with asyncio.timeout(_WITHIN):
            bus = await MessageBus(bus_type=BusType.SYSTEM).connect()
            try:
                for path, interface, member, signature, arguments in calls:
                    message = Message(
                        destination=_SYSTEMD,
                        path=path or answers[-1],
                        interface=interface,
                        member=member,
                        signature=signature,
                        body=arguments,
                    )
                    reply = await bus.call(message)
                    if reply.message_type is MessageType.ERROR:
                        raise SystemdRefused("systemd_refused", f"{reply.error_name}: {reply.body[:1]}")
                    answers.append(reply.body[0])
            finally:
                bus.disconnect()
    except (OSError, TimeoutError, EOFError, ValueError, AuthError, DBusError) as error:  # a bus that goes or errs
        raise SystemdRefused("systemd_unreachable", f"systemd cannot be reached over D-Bus: {error}") from error
    return answers


async def start(unit: str) -> None:
    """Start a unit, as far as polkit lets this user. Raises SystemdRefused."""
    manager = f"{_SYSTEMD}.Manager"
    await _call(("/org/freedesktop/systemd1", manager, "StartUnit", "ss", [unit, "replace"]))


async def revive_spawner() -> bool:
    """Have systemd start the spawner, and return whether it is going to; a refusal is logged."""
    if not await asyncio.to_thread(_BUS.exists):
        return False
    try:
        await start(SPAWNER)
    except SystemdRefused as error:
        log.warning("%s was not started: %s", SPAWNER, error.message)
        return False
    return True


async def workers_unit() -> WorkersUnit | None:
    """Return what systemd knows of the workers' unit; None where there is no systemd or no such unit."""
    if not await asyncio.to_thread(_BUS.exists):
        return None
    try:
        _, values = await _call(
            ("/org/freedesktop/systemd1", f"{_SYSTEMD}.Manager", "GetUnit", "s", [WORKERS]),
            ("", "org.freedesktop.DBus.Properties", "GetAll", "s", [f"{_SYSTEMD}.Service"]),
        )
    except SystemdRefused as error:
        log.warning("systemd does not tell of %s: %s", WORKERS, error.message)
        return None

    def number(name: str) -> int | None:
        value = int(values[name].value)
        return None if value == _UNLIMITED else value

    quota = number("CPUQuotaPerSecUSec")
    return WorkersUnit(
        str(values["ControlGroup"].value),
        number("MemoryMax"),
        number("MemoryCurrent"),
        number("TasksMax"),
        number("TasksCurrent"),
        None if quota is None else quota / 1_000_000,
        bool(values["Delegate"].value),
    )
