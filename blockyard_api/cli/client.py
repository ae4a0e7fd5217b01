"""A synchronous client of the HTTP API, in which everything that goes wrong is one sentence with the next step."""

import codecs
import ssl
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import httpx

from blockyard_api.cli.answers import Shape, fits, is_shallow

CHUNK = 1 << 16
CONNECT_TIMEOUT = 10.0
ANSWER_TIMEOUT = 60.0  # also between two pieces of an upload
FAILED, USED_WRONGLY = 1, 2  # exit statuses

_OF_THE_RELAY = "There is no app at this address."  # the control plane never says so below /api

Answer = dict[str, Any]


class Failure(Exception):
    """A command that could not do its work: a stable code, and one sentence with the next step."""

    exit_status = FAILED

    def __init__(self, code: str, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.status = status


class UsedWrongly(Failure):
    """A value on the command line that cannot be, whoever finds out: the command itself, or the server."""

    exit_status = USED_WRONGLY


def path(*parts: str) -> str:
    """Return a path below /api/v1 from parts that may hold anything."""
    return "/api/v1/" + "/".join(quote(part, safe="") for part in parts)


class Client:
    """One server, one token, and a connection that is kept for the command's time.

    `elsewhere` is the server that a kept login is for, where it is not this one.
    """

    def __init__(self, server: str, token: str | None, elsewhere: str | None = None) -> None:
        self._server = server
        self._elsewhere = elsewhere
        headers = {"User-Agent": "by", "Accept": "application/json, text/plain"}
        if token:
            headers["Authorization"] = f"Bearer {token}"
        timeout = httpx.Timeout(ANSWER_TIMEOUT, connect=CONNECT_TIMEOUT)
        try:
            self._http = httpx.Client(base_url=server, headers=headers, timeout=timeout)
        except (ImportError, ValueError, httpx.InvalidURL) as error:
            remedy = "correct the address, or what ALL_PROXY, HTTP_PROXY and HTTPS_PROXY name"
            raise Failure("no_way", f"There is no way to {server} ({error}); {remedy}.") from error
        except OSError as error:
            remedy = "correct or unset SSL_CERT_FILE and SSL_CERT_DIR"
            raise Failure("no_certificates", f"No certificates to trust can be read ({error}); {remedy}.") from error

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
        shape: Shape,
        body: object = None,
        *,
        query: Mapping[str, str | int] | None = None,
    ) -> Answer:
        """Send JSON and return the answer's JSON, which has this shape. Raises Failure."""
        response = self._request(method, where, body, query)
        if response.status_code in {httpx.codes.BAD_REQUEST, httpx.codes.UNPROCESSABLE_ENTITY}:
            refusal = self._refusal(response)
            if refusal.code != "unexpected_answer":
                raise UsedWrongly(refusal.code, refusal.message, refusal.status)
        return self._json(response, shape)

    def delete(self, where: str) -> None:
        """Delete something, which a Blockyard server answers with nothing. Raises Failure."""
        response = self._request("DELETE", where, None, None)
        self._check(response)
        if response.status_code != httpx.codes.NO_CONTENT:
            raise self._unexpected("answered with something where nothing was to be said")

    def upload(self, where: str, archive: Path, shape: Shape, progress: Callable[[int], None]) -> Answer:
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
        return self._json(response, shape)

    def text(self, where: str, **query: str) -> Iterator[str]:
        """Yield an answer's text as it arrives, however long that takes."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        timeout = httpx.Timeout(ANSWER_TIMEOUT, connect=CONNECT_TIMEOUT, read=None)
        try:
            with self._http.stream("GET", where, params=query, timeout=timeout) as response:
                if not response.is_success:
                    response.read()
                self._check(response)
                if not response.headers.get("content-type", "").startswith("text/plain"):
                    raise self._unexpected("answered something other than text")
                for piece in response.iter_bytes():
                    yield decoder.decode(piece)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        yield decoder.decode(b"", final=True)

    def _request(self, method: str, where: str, body: object, query: Mapping[str, str | int] | None) -> httpx.Response:
        try:
            return self._http.request(method, where, json=body, params=query)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: httpx.HTTPError) -> Failure:
        if reason := _tls_error(error):
            return Failure("no_tls", self._without_tls(reason))
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            remedy = "is the server running, and is this its address ('by login --server URL' sets another)?"
            return Failure("unreachable", f"Cannot reach {self._server}; {remedy}")
        if isinstance(error, httpx.TimeoutException):
            return Failure("timeout", f"{self._server} did not answer in time; try again, or ask its operator.")
        remedy = "try again"
        if self._server.startswith("http://"):
            remedy += ", with https:// if it speaks TLS"
        return Failure("connection_lost", f"The connection to {self._server} broke ({error}); {remedy}.")

    def _without_tls(self, reason: ssl.SSLError) -> str:
        if isinstance(reason, ssl.SSLCertVerificationError):
            remedy = "let SSL_CERT_FILE name its issuer's certificate if you trust it, or use the name it was made for"
            return f"The certificate of {self._server} is not accepted ({reason.verify_message}); {remedy}."
        plain = self._server.replace("https://", "http://", 1)
        words = (reason.reason or "no TLS").replace("_", " ").lower()
        return f"{self._server} does not speak TLS as it should ({words}); is its address {plain}?"

    def _check(self, response: httpx.Response) -> None:
        if not response.is_success:
            raise self._refusal(response)

    def _refusal(self, response: httpx.Response) -> Failure:
        status = response.status_code
        if response.has_redirect_location:
            return self._redirected(response)
        try:
            body = response.json()
            code, message = str(body["error"]), str(body["message"])
        except (ValueError, TypeError, KeyError, RecursionError):
            return self._unexpected(f"answered HTTP {status} without saying why", status)
        if message == _OF_THE_RELAY:
            remedy = "give the address they are managed at, usually that of port 8080, with --server"
            return Failure("relay", f"{self._server} is where visitors reach apps; {remedy}.", status)
        if status == httpx.codes.UNAUTHORIZED and self._elsewhere:
            remedy = f"use that address, or 'by login --server {self._server}'"
            message = f"Your login is for {self._elsewhere} and not for {self._server}; {remedy}."
        elif status == httpx.codes.UNAUTHORIZED and "by login" not in message:
            message = f"{message.removesuffix('.')}; run 'by login' with a valid token."
        return Failure(code, message, status)

    def _redirected(self, response: httpx.Response) -> Failure:
        asked = response.request.url
        target = str(asked.join(response.headers["location"]))
        there = target.removesuffix(asked.raw_path.decode("ascii"))
        if there == target:
            return self._unexpected(f"sends everybody to {target}", response.status_code)
        message = (
            f"{self._server} sends everybody to {there}; run 'by login --server {there}', or give it with --server."
        )
        return Failure("redirected", message, response.status_code)

    def _json(self, response: httpx.Response, shape: Shape) -> Answer:
        self._check(response)
        try:
            answer: Answer = response.json()
        except (ValueError, RecursionError) as error:
            raise self._unexpected("answered something other than JSON", response.status_code) from error
        if not (is_shallow(answer) and fits(answer, shape)):
            raise self._unexpected("answered something else than was asked for", response.status_code)
        return answer

    def _unexpected(self, what: str, status: int | None = None) -> Failure:
        return Failure("unexpected_answer", f"{self._server} {what}; is it a Blockyard server?", status)


def _tls_error(error: BaseException | None) -> ssl.SSLError | None:
    """Return why a connection found no TLS; httpx says only that there is none."""
    while error is not None and not isinstance(error, ssl.SSLError):
        error = error.__cause__ or error.__context__
    return error
