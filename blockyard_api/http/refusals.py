"""What an operation may answer beside success, as the OpenAPI document tells it: each names its own, and no others."""

from typing import Any

from blockyard_api.http.models import ErrorBody

_AGAIN = {"description": "Seconds until one may try again", "schema": {"type": "integer", "minimum": 1}}
_REFUSALS: dict[int, dict[str, Any]] = {
    400: {"description": "The request cannot be carried out as it stands"},
    401: {
        "description": "No valid token",
        "headers": {"WWW-Authenticate": {"required": True, "schema": {"type": "string", "const": "Bearer"}}},
    },
    403: {"description": "Not allowed"},
    404: {"description": "No such object, or none that the caller may see"},
    409: {"description": "Contradicts the present state"},
    410: {"description": "Was there once and never will be again"},
    413: {"description": "Larger than it may be"},
    429: {"description": "Asked faster than one may", "headers": {"Retry-After": {"required": True, **_AGAIN}}},
    503: {"description": "Cannot be done at the moment", "headers": {"Retry-After": _AGAIN}},
    507: {"description": "The disk is full, or broken"},
}
# A token is looked up in the database, for which even a read needs space on the disk: SQLite's index of its log.
STORED = (503, 507)
OF_CALLERS = (401, 429, *STORED)
ELSEWHERE = """HEAD is answered as GET is, without the body. Each operation names what it may answer with. What is not \
an operation's own is answered alike, in the shape of `ErrorBody`, and not named again: 404 for an address that is not \
here, 405 for a method that it does not have, 500 for a fault of the server, which its journal explains; and, before a \
request is looked at, 400 for what is no HTTP/1.1, 431 for a head above 64 KB, 429 and 503 where too many connections \
are open."""


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the part of FastAPI's `responses` that says these."""
    return {status: {"model": ErrorBody, **_REFUSALS[status]} for status in statuses}
