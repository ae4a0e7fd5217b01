"""`by deploy`: from a directory to a page.

All that can be found wrong here is found before the server hears of it. An app that a command made for a deployment
which then failed is removed again: it would be an empty page, and in the way of the next attempt's `--yes`.
"""

import re
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from blockyard_api.apps import naming
from blockyard_api.cli.answers import ACCEPTED, APP, TASK
from blockyard_api.cli.client import Answer, Client, Failure, UsedWrongly, path
from blockyard_api.cli.invocation import Yes, invocation, reference
from blockyard_api.cli.output import Output, size
from blockyard_api.cli.packing import pack

_GZIP = b"\x1f\x8b"


def deploy(
    context: typer.Context,
    source: Annotated[Path, typer.Argument(metavar="PATH", help="An app's directory, or a .tar.gz of it.")],
    name: Annotated[
        str | None, typer.Option(help="The app's name; by default the directory's.", callback=reference)
    ] = None,
    *,
    yes: Yes = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the deployment until it is served.")] = True,
) -> None:
    """Send an app to the server and wait until it is served.

    It is created there if it is new, and removed again if its first deployment fails while this waits. From a
    directory, what version control, editors and package libraries keep there is left out, and so is what the lines of
    a .byignore at its top name.
    """
    given = invocation(context)
    output = given.output
    name = name or _default_name(source)
    with _archive(source, output) as archive, given.client() as client:
        target = _target(client, output, name, yes=yes)
        accepted = _send(target, output, archive)
        status, reason = _follow(client, output, accepted["task_id"]) if wait else ("running", "")
        if status == "failed":
            raise target.without(Failure("deployment_failed", f"The deployment failed: {reason}"))
    called, url = target.app["name"], target.app["url"]
    if naming.ID.fullmatch(name) is None and called != name:
        output.note(f"'{name}' is a former name of '{called}'.")
    words = f"'{called}' is at {url}"
    if status != "completed":
        words = f"'{called}' was sent and will be at {url} unless that fails; 'by bundles {called}' tells"
    output.result({"app": called, "status": status, "url": url, **accepted}, words)


def _default_name(source: Path) -> str:
    try:
        stem = re.sub(r"(\.tar\.gz|\.tgz)$", "", source.resolve().name.lower())
    except RuntimeError as error:  # so says pathlib
        raise Failure(
            "unreadable", f"'{source}' is a link that leads to itself; name what it was to lead to."
        ) from error
    name = re.sub(r"[^a-z0-9]+", "-", stem).strip("-") or "app"
    if not naming.NAME.fullmatch(name):
        raise UsedWrongly("invalid_name", f"{naming.RULE.removesuffix('.')}; give one with --name instead of '{name}'.")
    return name


@contextmanager
def _archive(source: Path, output: Output) -> Iterator[Path]:
    if source.is_dir():
        with tempfile.NamedTemporaryFile(prefix="by-", suffix=".tar.gz") as packed:
            count = pack(source, packed)
            packed.flush()
            files = "1 file" if count == 1 else f"{count} files"
            output.note(f"Packed {files}, {size(Path(packed.name).stat().st_size)}.")
            yield Path(packed.name)
    else:
        _require_gzip(source)
        yield source


def _require_gzip(source: Path) -> None:
    try:
        if not stat.S_ISREG(source.stat().st_mode):  # a pipe is read once, and tells no size
            raise Failure("no_file", f"'{source}' is neither a directory nor a file; write the .tar.gz into one first.")
        with source.open("rb") as file:
            start = file.read(len(_GZIP))
    except FileNotFoundError as error:
        raise Failure("no_such_path", f"There is no '{source}'; name an app's directory or a .tar.gz.") from error
    except OSError as error:
        raise Failure("unreadable", f"'{source}' cannot be read ({error.strerror}); correct its mode.") from error
    if start != _GZIP:
        raise Failure("not_gzip", f"'{source}' is no .tar.gz; pack the app with tar -czf, or name its directory.")


@dataclass(frozen=True, slots=True)
class _Target:
    """The app that is deployed to, and whether it was made for that."""

    client: Client
    app: Answer
    new: bool

    def without(self, failure: Failure) -> Failure:
        """Remove the app as `remove` does; return the failure, which says so too."""
        told = self.remove()
        words = f"{failure.message.removesuffix('.')}; {told}." if told else failure.message
        return Failure(failure.code, words, failure.status)

    def remove(self) -> str:
        """Remove the app if it was made for the deployment that failed, and tell what became of it."""
        if not self.new:
            return ""
        name, where = self.app["name"], path("apps", self.app["id"])
        try:
            if self.client.call("GET", where, APP)["active_bundle"] is not None:
                return f"'{name}' serves what somebody else has deployed meanwhile"
            self.client.delete(where)
        except Failure:
            return f"the new app '{name}' stays without a bundle, and 'by delete {name}' removes it"
        return f"the new app '{name}' is removed again"


def _target(client: Client, output: Output, name: str, *, yes: bool) -> _Target:
    try:
        return _Target(client, client.call("GET", path("apps", name), APP), new=False)
    except Failure as failure:
        if failure.code != "not_found":
            raise
    question = f"There is no app '{name}' yet; create it?"
    if not yes and not output.confirm(question, f"There is no app '{name}'; add --yes to create it."):
        raise Failure("not_created", "Nothing was deployed; answer y, or add --yes, to create the app.")
    return _Target(client, client.call("POST", path("apps"), APP, {"name": name}), new=True)


def _send(target: _Target, output: Output, archive: Path) -> Answer:
    where = path("apps", target.app["id"], "bundles")
    try:
        with output.progress() as progress:
            bar = progress.add_task("Uploading", total=archive.stat().st_size)
            return target.client.upload(where, archive, ACCEPTED, lambda sent: progress.advance(bar, sent))
    except Failure as failure:
        raise target.without(failure) from failure
    except KeyboardInterrupt:
        target.remove()
        raise


def _follow(client: Client, output: Output, task: str) -> tuple[str, str]:
    """Show a deployment's log until it ends; return how it ended, and its last sentence."""
    text = ""
    for piece in client.text(path("tasks", task, "logs")):
        text += piece
        if piece.strip():
            output.note(piece.rstrip("\n"))
    _time, _, sentence = text.rstrip("\n").rpartition("\n")[2].partition(" ")
    return str(client.call("GET", path("tasks", task), TASK)["status"]), sentence
