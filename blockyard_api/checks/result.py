"""What a check found."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class Severity(StrEnum):
    """How bad it is; the members are in order, from good to bad."""

    OK = "ok"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Result:
    """One sentence of fact, one of remedy; a remedy is empty where there is nothing to do.

    `passing` marks an error that may be over in a moment, such as a spawner that is being restarted: then a start is
    to be tried again, while it stays away from what a person has to see to.
    """

    name: str
    severity: Severity
    fact: str
    remedy: str = ""
    passing: bool = False


def ok(name: str, fact: str) -> Result:
    """All is well."""
    return Result(name, Severity.OK, fact)


def info(name: str, fact: str, remedy: str = "") -> Result:
    """Worth knowing, not worth worrying."""
    return Result(name, Severity.INFO, fact, remedy)


def warning(name: str, fact: str, remedy: str) -> Result:
    """Something is less well protected than it could be."""
    return Result(name, Severity.WARNING, fact, remedy)


def error(name: str, fact: str, remedy: str, *, passing: bool = False) -> Result:
    """Nothing may be served like this."""
    return Result(name, Severity.ERROR, fact, remedy, passing)


def together(name: str, results: Sequence[Result]) -> Result:
    """Make one result of what was found of several kinds of workers, at least one."""
    errors = [result for result in results if result.severity is Severity.ERROR]
    return Result(
        name,
        worst(tuple(results)),
        " ".join(result.fact for result in results),
        " ".join(dict.fromkeys(result.remedy for result in results if result.remedy)),
        bool(errors) and all(result.passing for result in errors),
    )


def worst(results: tuple[Result, ...]) -> Severity:
    """Return the worst severity among results; ok where there is none."""
    order = list(Severity)
    return max((result.severity for result in results), key=order.index, default=Severity.OK)
