"""A synchronous client of the HTTP API, in which everything that goes wrong is one sentence with the next step."""

import codecs
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import httpx

CHUNK = 1 << 16
CONNECT_TIMEOUT = 10.0
ANSWER_TIMEOUT = 60.0  # also between two pieces of an upload

Answer = dict[str, Any]


class Failure(Exception):
    """A command that could not do its work: a stable code, and one sentence with the next step."""

    def __init__(self, code: str, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.status = status


def path(*parts: str) -> str:
    """Return a path below /api/v1 from parts that may hold anything."""
    return "/api/v1/" + "/".join(quote(part, safe="") for part in parts)


class Client:
    """One server, one token, and a connection that is kept for the command's time."""

    def __init__(self, server: str, token: str | None) -> None:
        self._server = server
        headers = {"User-Agent": "by", "Accept": "application/json, text/plain"}
        if token:
            headers["Authorization"] = f"Bearer {token}"
        timeout = httpx.Timeout(ANSWER_TIMEOUT, connect=CONNECT_TIMEOUT)
        self._http = httpx.Client(base_url=server, headers=headers, timeout=timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def call(
        self,
        method: str,
        where: str,
        body: object = None,
        *,
        query: Mapping[str, str | int] | None = None,
    ) -> Answer:
        """Send JSON and return the answer's JSON, empty where there is none. Raises Failure."""
        try:
            response = self._http.request(method, where, json=body, params=query)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        self._check(response)
        return self._json(response)

    def upload(self, where: str, archive: Path, progress: Callable[[int], None]) -> Answer:
        """Send a file as a request's body and return the answer's JSON; `progress` hears of every piece sent."""

        def pieces() -> Iterator[bytes]:
            with archive.open("rb") as file:
                while piece := file.read(CHUNK):
                    yield piece
                    progress(len(piece))

        headers = {"Content-Type": "application/gzip", "Content-Length": str(archive.stat().st_size)}
        try:
            response = self._http.post(where, content=pieces(), headers=headers)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        self._check(response)
        return self._json(response)

    def text(self, where: str, **query: str) -> Iterator[str]:
        """Yield an answer's text as it arrives, however long that takes."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        timeout = httpx.Timeout(ANSWER_TIMEOUT, connect=CONNECT_TIMEOUT, read=None)
        try:
            with self._http.stream("GET", where, params=query, timeout=timeout) as response:
                if response.is_error:
                    response.read()
                self._check(response)
                for piece in response.iter_bytes():
                    yield decoder.decode(piece)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        yield decoder.decode(b"", final=True)

    def _unreachable(self, error: httpx.HTTPError) -> Failure:
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            remedy = "is the server running, and is this its address ('by login --server URL' sets another)?"
            return Failure("unreachable", f"Cannot reach {self._server}; {remedy}")
        if isinstance(error, httpx.TimeoutException):
            return Failure("timeout", f"{self._server} did not answer in time; try again, or ask its operator.")
        return Failure("connection_lost", f"The connection to {self._server} broke ({error}); try again.")

    def _check(self, response: httpx.Response) -> None:
        if response.is_success:
            return
        status = response.status_code
        try:
            body = response.json()
            code, message = str(body["error"]), str(body["message"])
        except (ValueError, TypeError, KeyError):
            code = "unexpected_answer"
            message = f"{self._server} answered HTTP {status} without saying why; is it a Blockyard server?"
        if status == httpx.codes.UNAUTHORIZED and "by login" not in message:
            message = f"{message.removesuffix('.')}; run 'by login' with a valid token."
        raise Failure(code, message, status)

    def _json(self, response: httpx.Response) -> Answer:
        if not response.content:
            return {}
        try:
            answer: Answer = response.json()
        except ValueError as error:
            message = f"{self._server} answered something other than JSON; is it a Blockyard server?"
            raise Failure("unexpected_answer", message, response.status_code) from error
        return answer
