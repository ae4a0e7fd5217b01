"""The commands of `by`. Each is a call or two of the HTTP API and a way to show the answer.

Exit status: 0 done, 1 failed (one sentence on standard error), 2 used wrongly, 130 interrupted.
"""

import itertools
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from getpass import getpass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer

from blockyard_api.cli import apparmor, credentials, seccomp
from blockyard_api.cli.client import Client, Failure, path
from blockyard_api.cli.firewall import firewall
from blockyard_api.cli.output import Output, size
from blockyard_api.cli.packing import pack

INTERRUPTED = 130
PER_PAGE = 200
_VALUED = ("--server", "--token")

app = typer.Typer(
    name="by",
    help="Deploy and run Shiny apps on a Blockyard server.",
    epilog="--json, --server and --token may stand anywhere in a command.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: no box around one sentence, and half the start-up time
    context_settings={"help_option_names": ["-h", "--help"]},
)
tokens_app = typer.Typer(help="Make, list and revoke your access tokens.", no_args_is_help=True)
admin_app = typer.Typer(help="Look after the server.", no_args_is_help=True)
app.add_typer(tokens_app, name="tokens")
app.add_typer(admin_app, name="admin")
admin_app.command("install-seccomp")(seccomp.install)
admin_app.command("install-apparmor")(apparmor.install_apparmor)
admin_app.command()(firewall)

AppName = Annotated[str, typer.Argument(metavar="APP", help="The app's name or id.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
Sessions = Annotated[
    int | None, typer.Option("--sessions-per-worker", min=1, help="Visitors that share one R process.")
]
Workers = Annotated[str | None, typer.Option("--max-workers", help="R processes at most; 'none': the server's limit.")]
Warm = Annotated[int | None, typer.Option("--pre-warmed", min=0, help="Places kept ready for the next visitors.")]


@dataclass(frozen=True, slots=True)
class Invocation:
    """What every command is given: how to print, and which server it was told to use."""

    output: Output
    server: str | None
    token: str | None

    @contextmanager
    def client(self) -> Iterator[Client]:
        """Connect with whatever login there is."""
        login = credentials.resolve(self.server, self.token, os.environ)
        with Client(login.server, login.token) as client:
            yield client


def _invocation(context: typer.Context) -> Invocation:
    invocation = context.find_object(Invocation)
    if invocation is None:
        raise Failure("internal_error", "The command was started without its options; report this.")
    return invocation


def _print_version(wanted: bool) -> None:  # noqa: FBT001 - Typer passes it by position
    if wanted:
        sys.stdout.write(f"by {version('blockyard')}\n")
        raise typer.Exit


@app.callback()
def by(
    context: typer.Context,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    server: Annotated[str | None, typer.Option(help="The server's address [BLOCKYARD_URL].")] = None,
    token: Annotated[str | None, typer.Option(help="An access token [BLOCKYARD_TOKEN].")] = None,
    show_version: Annotated[  # noqa: ARG001 - its callback does the work
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Deploy and run Shiny apps on a Blockyard server."""
    context.obj = Invocation(Output(as_json=as_json), server, token)


@app.command()
def login(context: typer.Context) -> None:
    """Keep a server's address and a token.

    Asks for the token where neither --token nor BLOCKYARD_TOKEN gives it.
    """
    invocation = _invocation(context)
    output = invocation.output
    known = credentials.resolve(invocation.server, invocation.token, os.environ)
    token = invocation.token or os.environ.get("BLOCKYARD_TOKEN")
    if token is None:
        if not output.interactive:
            raise Failure("no_token", "Nobody can be asked for the token here; give it with --token.")
        token = getpass(f"Token for {known.server}: ").strip()
    chosen = credentials.resolve(known.server, token, {})
    with Client(chosen.server, chosen.token) as client:
        user = client.call("GET", path("users", "me"))
    kept = credentials.save(chosen)
    parts = urlsplit(chosen.server)
    if parts.scheme == "http" and parts.hostname not in {"127.0.0.1", "localhost", "::1"}:
        output.note("The token travels unencrypted to this server; prefer its https address.")
    output.result(
        {"server": chosen.server, **user},
        f"Logged in to {chosen.server} as {user['name'] or user['sub']} ({user['role']}); kept in {kept}.",
    )


@app.command()
def logout(context: typer.Context) -> None:
    """Forget the kept server and token.

    The token stays valid until it is revoked or expires.
    """
    was = credentials.forget()
    _invocation(context).output.result({"logged_out": was}, "Logged out." if was else "There was no login to forget.")


@app.command()
def deploy(
    context: typer.Context,
    source: Annotated[Path, typer.Argument(metavar="PATH", help="An app's directory, or a .tar.gz of it.")],
    name: Annotated[str | None, typer.Option(help="The app's name; by default the directory's.")] = None,
    *,
    yes: Yes = False,
    wait: Annotated[
        bool | None, typer.Option("--wait/--no-wait", help="Follow until it is served; the default on a terminal.")
    ] = None,
) -> None:
    """Send an app to the server.

    It is created there if it is new. From a directory, what version control, editors and package libraries keep there
    is left out, and so is what the lines of a .byignore at its top name.
    """
    invocation = _invocation(context)
    output = invocation.output
    name = name or _default_name(source)
    with _archive(source, output) as archive, invocation.client() as client:
        if not _exists(client, name):
            question = f"There is no app '{name}' yet; create it?"
            if not yes and not output.confirm(question, f"There is no app '{name}'; add --yes to create it."):
                raise Failure("not_created", "Nothing was deployed.")
            client.call("POST", path("apps"), {"name": name})
        with output.progress() as progress:
            bar = progress.add_task("Uploading", total=archive.stat().st_size)
            accepted = client.upload(path("apps", name, "bundles"), archive, lambda sent: progress.advance(bar, sent))
        status = "running"
        if output.interactive if wait is None else wait:
            status = _follow(client, output, accepted["task_id"])
        url = client.call("GET", path("apps", name))["url"]
    if status == "failed":
        raise Failure("deployment_failed", "The deployment failed; correct what its log says and deploy again.")
    words = f"'{name}' is at {url}" if status == "completed" else f"'{name}' was sent and will be at {url}"
    output.result({"app": name, "status": status, "url": url, **accepted}, words)


def _default_name(source: Path) -> str:
    stem = re.sub(r"(\.tar\.gz|\.tgz)$", "", source.resolve().name.lower())
    return re.sub(r"[^a-z0-9]+", "-", stem).strip("-") or "app"


@contextmanager
def _archive(source: Path, output: Output) -> Iterator[Path]:
    if source.is_dir():
        with tempfile.NamedTemporaryFile(prefix="by-", suffix=".tar.gz") as packed:
            count = pack(source, packed)
            packed.flush()
            output.note(f"Packed {count} files, {size(Path(packed.name).stat().st_size)}.")
            yield Path(packed.name)
    elif source.is_file():
        yield source
    else:
        raise Failure("no_such_path", f"There is no '{source}'; name an app's directory or a .tar.gz.")


def _exists(client: Client, name: str) -> bool:
    try:
        client.call("GET", path("apps", name))
    except Failure as failure:
        if failure.status == 404:
            return False
        raise
    return True


def _follow(client: Client, output: Output, task: str) -> str:
    """Show a deployment's log until it ends, on standard error, and return how it ended."""
    for piece in client.text(path("tasks", task, "logs")):
        if piece.strip():
            output.note(piece.rstrip("\n"))
    return str(client.call("GET", path("tasks", task))["status"])


@app.command("list")
def list_apps(
    context: typer.Context,
    search: Annotated[str, typer.Option(help="Only apps with this in name, title or description.")] = "",
) -> None:
    """Name the apps you may see."""
    invocation = _invocation(context)
    found: list[dict[str, Any]] = []
    with invocation.client() as client:
        for number in itertools.count(1):
            page = client.call("GET", path("apps"), query={"search": search, "page": number, "per_page": PER_PAGE})
            found += page["apps"]
            if not page["apps"] or len(found) >= page["total"]:
                break
    headings = ("name", "status", "enabled", "access", "title", "address")
    keys = ("name", "status", "enabled", "access_type", "title", "url")
    rows = [[one[key] for key in keys] for one in found]
    invocation.output.table({"apps": found}, headings, rows, empty="There are no apps; 'by deploy PATH' makes one.")


@app.command()
def get(
    context: typer.Context,
    name: AppName,
    *,
    runtime: Annotated[bool, typer.Option("--runtime", help="Its workers and visitors, too.")] = False,
) -> None:
    """Show one app."""
    invocation = _invocation(context)
    with invocation.client() as client:
        found = client.call("GET", path("apps", name))
        running = client.call("GET", path("apps", name, "runtime")) if runtime else None
    if running is None:
        invocation.output.record(found, _fields(found))
        return
    counts = {key: value for key, value in running.items() if key != "workers"}
    invocation.output.record({**found, "runtime": running}, [*_fields(found), *_fields(counts)])
    if not invocation.output.as_json:
        headings = ("worker", "status", "bundle", "started", "visitors", "cpu", "memory", "limits", "end")
        rows = [_worker_row(worker) for worker in running["workers"]]
        invocation.output.table(None, headings, rows, empty="No worker has run yet; open the app to start one.")


def _fields(record: Mapping[str, object]) -> list[tuple[str, object]]:
    return [
        (key.replace("_", " "), ", ".join(map(str, value)) if isinstance(value, list) else value)
        for key, value in record.items()
    ]


def _worker_row(worker: Mapping[str, Any]) -> list[object]:
    stats = worker["stats"] or {}
    cpu = stats.get("cpu_percent")
    return [
        worker["id"],
        worker["status"],
        worker["bundle_id"],
        worker["started_at"],
        len(worker["sessions"]),
        None if cpu is None else f"{cpu:.0f} %",
        _of(size(stats.get("memory_usage_bytes")), size(stats.get("memory_limit_bytes"))),
        "; ".join(worker["limits_hit"]),
        worker["end_reason"],
    ]


@app.command()
def logs(
    context: typer.Context,
    name: AppName,
    *,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on while the worker runs.")] = False,
    worker: Annotated[str, typer.Option("--worker", "-w", help="A worker's id; by default the newest.")] = "",
) -> None:
    """Print what an app wrote.

    Control characters are made visible on a terminal, and pass unchanged into a pipe.
    """
    invocation = _invocation(context)
    query = {"stream": "true" if follow else "false"} | ({"worker_id": worker} if worker else {})
    with invocation.client() as client:
        invocation.output.stream(
            client.text(path("apps", name, "logs"), **query), empty=f"'{name}' has written nothing yet."
        )


@app.command()
def bundles(context: typer.Context, name: AppName) -> None:
    """Name what was deployed of an app, newest first."""
    invocation = _invocation(context)
    with invocation.client() as client:
        active = client.call("GET", path("apps", name))["active_bundle"]
        found = client.call("GET", path("apps", name, "bundles"))
    rows = [
        [one["id"], one["status"], one["id"] == active, one["uploaded_at"], one["deployed_by"], one["pinned"]]
        for one in found["bundles"]
    ]
    headings = ("bundle", "status", "active", "uploaded", "by", "pinned")
    invocation.output.table(found, headings, rows, empty=f"'{name}' has no bundles; 'by deploy PATH' sends one.")


@app.command()
def rollback(
    context: typer.Context,
    name: AppName,
    bundle: Annotated[str | None, typer.Argument(metavar="[BUNDLE]", help="By default the one served before.")] = None,
) -> None:
    """Serve an earlier bundle again.

    Open sessions end on the bundle they began with.
    """
    body = {"bundle_id": bundle} if bundle else {}
    _act(context, "POST", path("apps", name, "rollback"), body, "'{name}' serves bundle {active_bundle} now.")


@app.command()
def enable(context: typer.Context, name: AppName) -> None:
    """Let visitors in again."""
    _act(context, "POST", path("apps", name, "enable"), None, "'{name}' is enabled, at {url}")


@app.command()
def disable(context: typer.Context, name: AppName) -> None:
    """Close an app to visitors and end its workers."""
    _act(
        context, "POST", path("apps", name, "disable"), None, "'{name}' is disabled; 'by enable {name}' opens it again."
    )


def _act(context: typer.Context, method: str, where: str, body: object, sentence: str) -> None:
    """Make a call that answers with an app, and say so with the app's fields put in."""
    invocation = _invocation(context)
    with invocation.client() as client:
        changed = client.call(method, where, body)
    invocation.output.result(changed, sentence.format_map(changed))


@app.command()
def delete(context: typer.Context, name: AppName, *, yes: Yes = False) -> None:
    """Delete an app and end its workers."""
    invocation = _invocation(context)
    with invocation.client() as client:
        found = client.call("GET", path("apps", name))["name"]
        question = f"Delete '{found}' with all its bundles?"
        if not yes and not invocation.output.confirm(question, f"Add --yes to delete '{found}' with all its bundles."):
            raise Failure("not_deleted", "Nothing was deleted.")
        client.call("DELETE", path("apps", name))
    invocation.output.result({"deleted": found}, f"'{found}' is deleted.")


@app.command()
def update(
    context: typer.Context,
    name: AppName,
    new_name: Annotated[str | None, typer.Option("--name", help="A new name; the old one stays an alias.")] = None,
    title: Annotated[str | None, typer.Option(help="The title people see.")] = None,
    description: Annotated[str | None, typer.Option(help="What the app is for.")] = None,
    access: Annotated[str | None, typer.Option(help="Who may open it: public, logged_in or acl.")] = None,
    memory: Annotated[str | None, typer.Option(help="Memory of each worker, like 512m; 'none': the default.")] = None,
    cpu: Annotated[str | None, typer.Option(help="Cores of each worker, like 0.5; 'none': the default.")] = None,
    max_workers: Workers = None,
    sessions_per_worker: Sessions = None,
    pre_warmed: Warm = None,
    network: Annotated[str | None, typer.Option(help="host or none; 'default': the server's.")] = None,
    backend: Annotated[str | None, typer.Option(help="process or docker; 'default': the server's.")] = None,
    scratch_copy: Annotated[
        bool | None, typer.Option("--scratch-copy/--no-scratch-copy", help="Run from a writable copy of the bundle.")
    ] = None,
    refresh_schedule: Annotated[str | None, typer.Option(help="When to refresh; not available yet.")] = None,
) -> None:
    """Change an app's settings.

    Limits count for workers that start from now on.
    """
    given = {
        "name": new_name,
        "title": title,
        "description": description,
        "access_type": access,
        "max_sessions_per_worker": sessions_per_worker,
        "pre_warmed_sessions": pre_warmed,
        "scratch_copy": scratch_copy,
        "refresh_schedule": refresh_schedule,
    }
    changes: dict[str, object] = {key: value for key, value in given.items() if value is not None}
    changes |= _limit("memory_limit", memory, str) | _limit("cpu_limit", cpu, float)
    changes |= _limit("max_workers_per_app", max_workers, int)
    if network is not None:
        changes["network"] = None if network == "default" else network
    if backend is not None:
        changes["backend"] = None if backend == "default" else backend
    _change(context, name, changes)


@app.command()
def scale(
    context: typer.Context,
    name: AppName,
    max_workers: Workers = None,
    sessions_per_worker: Sessions = None,
    pre_warmed: Warm = None,
) -> None:
    """Set an app's number of R processes."""
    given = {"max_sessions_per_worker": sessions_per_worker, "pre_warmed_sessions": pre_warmed}
    changes: dict[str, object] = {key: value for key, value in given.items() if value is not None}
    _change(context, name, changes | _limit("max_workers_per_app", max_workers, int))


def _limit(key: str, value: str | None, kind: type[str | int | float]) -> dict[str, object]:
    if value is None:
        return {}
    if value == "none":
        return {key: None}
    if kind is not str and not re.fullmatch(r"[0-9]+" if kind is int else r"[0-9]+(\.[0-9]+)?", value):
        hint = key.replace("_", " ")
        raise typer.BadParameter(f"'{value}' is neither a number nor 'none'.", param_hint=hint)
    return {key: kind(value)}


def _change(context: typer.Context, name: str, changes: Mapping[str, object]) -> None:
    if not changes:
        raise typer.BadParameter("name at least one setting to change; --help lists them.", param_hint="options")
    sentence = "'{name}' is changed: " + ", ".join(f"{key.replace('_', ' ')} {{{key}}}" for key in changes) + "."
    _act(context, "PATCH", path("apps", name), changes, sentence)


@tokens_app.command("list")
def list_tokens(context: typer.Context) -> None:
    """Name your tokens, newest first."""
    invocation = _invocation(context)
    with invocation.client() as client:
        found = client.call("GET", path("users", "me", "tokens"))
    keys = ("id", "name", "created_at", "expires_at", "last_used_at")
    rows = [[one[key] for key in keys] for one in found["tokens"]]
    invocation.output.table(found, ("token", "name", "created", "expires", "last used"), rows, empty="No tokens.")


@tokens_app.command("create")
def create_token(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="What it is for.")] = "token",
    days: Annotated[int, typer.Option(min=1, max=366, help="Days until it expires.")] = 90,
) -> None:
    """Make a token and print it, this once."""
    invocation = _invocation(context)
    with invocation.client() as client:
        made = client.call("POST", path("users", "me", "tokens"), {"name": name, "expires_in_days": days})
    invocation.output.note("Keep this token now: it is not shown again.")
    invocation.output.result(made, made["token"])


@tokens_app.command("revoke")
def revoke_token(
    context: typer.Context, token_id: Annotated[str, typer.Argument(metavar="ID", help="As 'by tokens list' names it.")]
) -> None:
    """Make a token invalid at once."""
    invocation = _invocation(context)
    with invocation.client() as client:
        client.call("DELETE", path("users", "me", "tokens", token_id))
    invocation.output.result({"revoked": token_id}, "The token is revoked.")


@admin_app.command()
def check(context: typer.Context) -> None:
    """Run the start-up checks on the server and show what they found, and in a last line what apps are isolated by.

    Exit status 1 if one of them is an error: the server would not start like this.
    """
    invocation = _invocation(context)
    with invocation.client() as client:
        run = client.call("POST", path("system", "checks", "run"))
    headings = ("check", "severity", "fact", "remedy")
    rows = [[one[key] for key in ("name", "severity", "fact", "remedy")] for one in run["checks"]]
    invocation.output.table(run, headings, rows, empty="The server made no checks.")
    if not invocation.output.as_json and (isolation := run.get("isolation")):  # an older server tells none
        invocation.output.result(run, isolation)
    if run["severity"] == "error":
        raise Failure("check_failed", "The server would not start like this; see the checks that are errors.")


@admin_app.command()
def status(context: typer.Context) -> None:
    """Show daemons, workers and limits."""
    invocation = _invocation(context)
    with invocation.client() as client:
        found = client.call("GET", path("system", "status"))
    spawner, workers, unit = found["spawner"], found["workers"], found["unit"] or {}
    fields: list[tuple[str, object]] = [
        ("version", found["version"]),
        ("backend", found["backend"]),
        ("spawner connected", spawner["connected"]),
        ("spawner unprivileged", spawner["unprivileged"]),
        ("free uids", spawner["uids_free"]),
        ("limits enforced by", ", ".join(spawner["controllers"] or [])),
        ("workers", f"{workers['running']} of {workers['max']}"),
        ("workers' cgroup", unit.get("control_group")),
        ("memory", _of(size(unit.get("memory_current")), size(unit.get("memory_max")))),
        ("tasks", _of(unit.get("tasks_current"), unit.get("tasks_max"))),
        ("cpu quota", unit.get("cpu_quota")),
    ]
    invocation.output.record(found, fields)


def _of(current: object, most: object) -> str | None:
    return None if current is None else f"{current} of {'unlimited' if most is None else most}"


def _hoisted(arguments: list[str]) -> list[str]:
    """Move the options that hold for every command to the front, where Typer expects them."""
    front: list[str] = []
    rest: list[str] = []
    left = iter(arguments)
    for argument in left:
        if argument == "--":
            rest += [argument, *left]
        elif argument == "--json" or argument.startswith(tuple(f"{name}=" for name in _VALUED)):
            front.append(argument)
        elif argument in _VALUED:
            front += [argument, *[value for value in [next(left, None)] if value is not None]]
        else:
            rest.append(argument)
    return front + rest


def main() -> None:
    """Run `by`."""
    arguments = _hoisted(sys.argv[1:])
    try:
        app(arguments)
    except Failure as failure:
        Output(as_json="--json" in arguments).failure(failure.code, failure.message)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
