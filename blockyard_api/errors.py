"""Errors that a caller can act on: a stable code, one sentence with the next step, and the HTTP status they mean.

They are raised where they are understood; `http.app` alone turns them into responses.
"""

import math


class BlockyardError(Exception):
    """A failure with a stable snake_case code and one sentence that says what to do."""

    status = 500

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class BadRequest(BlockyardError):
    """The request cannot be carried out as it stands."""

    status = 400


class Unauthorized(BlockyardError):
    """The caller did not say who it is, or not convincingly."""

    status = 401


class Forbidden(BlockyardError):
    """The caller may see the object but not do this to it."""

    status = 403


class NotFound(BlockyardError):
    """There is no such object, or none that the caller may see."""

    status = 404


class Conflict(BlockyardError):
    """The request contradicts the present state."""

    status = 409


class Gone(BlockyardError):
    """What was asked for existed once and never will again."""

    status = 410


class TooLarge(BlockyardError):
    """The body is larger than the configuration allows."""

    status = 413


class TooMany(BlockyardError):
    """The caller asks faster than it may; `retry_after` is in seconds."""

    status = 429

    def __init__(self, code: str, message: str, retry_after: float) -> None:
        super().__init__(code, message)
        self.retry_after = max(1, math.ceil(retry_after))


class BadGateway(BlockyardError):
    """The worker failed in the middle of a request, or since the last one."""

    status = 502


class Unavailable(BlockyardError):
    """The server cannot do this at the moment; `retry_after` (seconds) says when to try again, if known."""

    status = 503

    def __init__(self, code: str, message: str, retry_after: float | None = None) -> None:
        super().__init__(code, message)
        self.retry_after = None if retry_after is None else max(1, math.ceil(retry_after))


class OutOfSpace(BlockyardError):
    """The disk is full: nothing was kept of what was being written."""

    status = 507


class NotStarted(BlockyardError):
    """The start-up checks found errors; `passing` says that each is of a kind that may be over in a moment."""

    def __init__(self, code: str, message: str, *, passing: bool) -> None:
        super().__init__(code, message)
        self.passing = passing
