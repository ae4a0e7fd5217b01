"""The commands of `by`. Each is a call or two of the HTTP API and a way to show the answer.

Exit status: 0 done, 1 failed (one sentence on standard error), 2 used wrongly, 130 interrupted.
"""

import io
import itertools
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from getpass import getpass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import typer

from blockyard_api.cli import apparmor, credentials, seccomp
from blockyard_api.cli.answers import APP, APPS, BUNDLES, CHECKS, NEW_TOKEN, RUNTIME, STATUS, TOKENS, USER, Shape
from blockyard_api.cli.client import Answer, Client, Failure, UsedWrongly, path
from blockyard_api.cli.deploy import deploy
from blockyard_api.cli.firewall import firewall
from blockyard_api.cli.invocation import AppName, Invocation, Yes, invocation, reference, whole_id
from blockyard_api.cli.output import Output, size
from blockyard_api.clock import rfc3339

INTERRUPTED = 130
PER_PAGE = 200
_VALUED = ("--server", "--token")
# What the command line calls settings of the API, where it is another word.
_OPTIONS = {
    "access_type": "access",
    "memory_limit": "memory",
    "cpu_limit": "cpu",
    "max_workers_per_app": "max-workers",
    "max_sessions_per_worker": "sessions-per-worker",
    "pre_warmed_sessions": "pre-warmed",
    "scratch_copy": "scratch-copy",
}

app = typer.Typer(
    name="by",
    help="Deploy and run Shiny apps on a Blockyard server.",
    epilog="--json, --server and --token may stand anywhere in a command. With --json nothing is asked, and standard"
    " error has nothing but one JSON object, if the command fails.",
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

Sessions = Annotated[
    int | None, typer.Option("--sessions-per-worker", min=1, help="Visitors that share one R process.")
]
Workers = Annotated[str | None, typer.Option("--max-workers", help="R processes at most; 'none': the server's limit.")]
Warm = Annotated[int | None, typer.Option("--pre-warmed", min=0, help="Places kept ready for the next visitors.")]


def _print_version(wanted: bool) -> None:  # noqa: FBT001 - Typer passes it by position
    if wanted:
        Output(as_json=False).content(f"by {version('blockyard')}\n".encode())
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
    if token == "":
        raise UsedWrongly("empty_token", "The token after --token is empty; what should have printed it has failed.")
    context.obj = Invocation(Output(as_json=as_json), server, token)


@app.command()
def login(context: typer.Context) -> None:
    """Keep a server's address and a token.

    Asks for the token where neither --token nor BLOCKYARD_TOKEN gives it.
    """
    given = invocation(context)
    output = given.output
    server = credentials.resolve(given.server, None, os.environ).server
    token = given.token or os.environ.get("BLOCKYARD_TOKEN") or _asked_token(output, server)
    chosen = credentials.resolve(server, token, {})
    with Client(chosen.server, chosen.token) as client:
        user = client.call("GET", path("users", "me"), USER)
    kept = credentials.save(chosen)
    parts = urlsplit(chosen.server)
    warnings = []
    if parts.scheme == "http" and parts.hostname not in {"127.0.0.1", "localhost", "::1"}:
        warnings = ["The token travels unencrypted to this server; prefer its https address."]
        output.note(*warnings)
    output.result(
        {"server": chosen.server, **user, "warnings": warnings},
        f"Logged in to {chosen.server} as {user['name'] or user['sub']} ({user['role']}); kept in {kept}.",
    )


def _asked_token(output: Output, server: str) -> str:
    if not output.interactive:
        raise Failure("no_token", "Nobody can be asked for the token here; give it with --token.")
    try:
        if token := getpass(f"Token for {server}: ").strip():
            return token
    except EOFError:
        output.note("")  # the question's line has not ended
    raise Failure("no_token", "No token was given, so nothing has changed; 'by login' asks for it again.")


@app.command()
def logout(context: typer.Context) -> None:
    """Forget the kept server and token.

    The token stays valid until it is revoked or expires.
    """
    was = credentials.forget()
    invocation(context).output.result({"logged_out": was}, "Logged out." if was else "There was no login to forget.")


app.command()(deploy)  # here, since help names commands in this order


@app.command("list")
def list_apps(
    context: typer.Context,
    search: Annotated[str, typer.Option(help="Only apps with this in name, title or description.")] = "",
) -> None:
    """Name the apps you may see."""
    given = invocation(context)
    found: list[dict[str, Any]] = []
    with given.client() as client:
        for number in itertools.count(1):
            query: dict[str, str | int] = {"search": search, "page": number, "per_page": PER_PAGE}
            page = client.call("GET", path("apps"), APPS, query=query)
            found += page["apps"]
            if not page["apps"] or len(found) >= page["total"]:
                break
    headings = ("name", "status", "access", "title", "address")
    rows = [[one["name"], _status(one), one["access_type"], one["title"], one["url"]] for one in found]
    empty = "There are no apps; 'by deploy PATH' makes one."
    if search:
        empty = f"No app has '{search}' in its name, title or description; 'by list' names all."
    given.output.table({"apps": found}, headings, rows, empty=empty)


def _status(one: Mapping[str, Any]) -> str:
    return str(one["status"] if one["enabled"] else "disabled")


@app.command()
def get(
    context: typer.Context,
    name: AppName,
    *,
    runtime: Annotated[bool, typer.Option("--runtime", help="Its workers and visitors, too.")] = False,
) -> None:
    """Show one app."""
    given = invocation(context)
    with given.client() as client:
        found = client.call("GET", path("apps", name), APP)
        running = client.call("GET", path("apps", name, "runtime"), RUNTIME) if runtime else None
    if running is None:
        given.output.record(found, _fields(found))
        return
    counts = {key: value for key, value in running.items() if key not in ("workers", "starting")}
    given.output.record({**found, "runtime": running}, [*_fields(found), *_fields(counts)])
    if not given.output.as_json:
        headings = ("worker", "status", "bundle", "started", "use")
        rows = [[one, "starting", None, None, None] for one in running.get("starting", [])]
        rows += [_worker_row(worker) for worker in running["workers"]]
        empty = "No worker has run yet; open the app to start one."
        given.output.table(None, headings, rows, empty=empty, ids={"worker", "bundle"})


def _fields(record: Mapping[str, object]) -> list[tuple[str, object]]:
    return [
        (key.replace("_", " "), ", ".join(map(str, value)) if isinstance(value, list) else value)
        for key, value in record.items()
    ]


def _worker_row(worker: Mapping[str, Any]) -> list[object]:
    stats = worker["stats"] or {}
    cpu, memory = stats.get("cpu_percent"), stats.get("memory_usage_bytes")
    visitors = len(worker["sessions"])
    use = [
        f"{visitors} visitor{'' if visitors == 1 else 's'}" if worker["stats"] or visitors else None,
        None if cpu is None else f"{cpu:.0f} % CPU",
        _of(size(memory), size(stats.get("memory_limit_bytes"))),
    ]
    status = [worker["status"], *worker["limits_hit"], worker["end_reason"]]
    return [
        worker["id"],
        "; ".join(part for part in status if part),
        worker["bundle_id"],
        worker["started_at"],
        ", ".join(part for part in use if part),
    ]


@app.command()
def logs(
    context: typer.Context,
    name: AppName,
    *,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on while the worker runs.")] = False,
    worker: Annotated[
        str, typer.Option("--worker", "-w", help="A worker's id or its beginning; by default the newest.")
    ] = "",
) -> None:
    """Print what an app wrote.

    Control characters are made visible on a terminal, and pass unchanged into a pipe.
    """
    given = invocation(context)
    query = {"stream": "true" if follow else "false"}
    with given.client() as client:
        if worker:
            known = _ids(client, "workers", RUNTIME, "apps", name, "runtime")
            query["worker_id"] = whole_id(worker, known, "worker", f"by get {name} --runtime")
        given.output.stream(
            client.text(path("apps", name, "logs"), **query), empty=f"'{name}' has written nothing yet."
        )


def _ids(client: Client, key: str, shape: Shape, *where: str) -> Iterator[str]:
    """Ask the server for ids once the first of them is wanted: who gives a whole id needs none."""
    yield from (one["id"] for one in client.call("GET", path(*where), shape)[key])


@app.command()
def bundles(context: typer.Context, name: AppName) -> None:
    """Name what was deployed of an app, newest first."""
    given = invocation(context)
    with given.client() as client:
        active = client.call("GET", path("apps", name), APP)["active_bundle"]
        found = client.call("GET", path("apps", name, "bundles"), BUNDLES)
    rows = [
        [
            *(one["id"], ": ".join(filter(None, (one["status"], one.get("reason")))), one["id"] == active),
            *(one["uploaded_at"], one["deployed_by"], one["pinned"]),
        ]
        for one in found["bundles"]
    ]
    headings = ("bundle", "status", "active", "uploaded", "by", "pinned")
    empty = f"'{name}' has no bundles; 'by deploy PATH' sends one."
    given.output.table(found, headings, rows, empty=empty, ids={"bundle"})


@app.command()
def rollback(
    context: typer.Context,
    name: AppName,
    bundle: Annotated[
        str | None, typer.Argument(metavar="BUNDLE", help="Its id or what that begins with; by default the one before.")
    ] = None,
) -> None:
    """Serve an earlier bundle again.

    Open sessions end on the bundle they began with.
    """
    given = invocation(context)
    body = {}
    with given.client() as client:
        if bundle is not None:
            known = _ids(client, "bundles", BUNDLES, "apps", name, "bundles")
            body["bundle_id"] = whole_id(bundle, known, "bundle", f"by bundles {name}")
        changed = client.call("POST", path("apps", name, "rollback"), APP, body)
    given.output.result(changed, f"'{changed['name']}' serves bundle {changed['active_bundle']} now.")


@app.command()
def enable(context: typer.Context, name: AppName) -> None:
    """Let visitors in again."""
    changed = _switched(context, name, "enable")
    invocation(context).output.result(changed, f"'{changed['name']}' is enabled, at {changed['url']}")


@app.command()
def disable(context: typer.Context, name: AppName) -> None:
    """Close an app to visitors and end its workers."""
    changed = _switched(context, name, "disable")
    called = changed["name"]
    invocation(context).output.result(changed, f"'{called}' is disabled; 'by enable {called}' opens it again.")


def _switched(context: typer.Context, name: str, verb: str) -> Answer:
    with invocation(context).client() as client:
        return client.call("POST", path("apps", name, verb), APP)


@app.command()
def delete(context: typer.Context, name: AppName, *, yes: Yes = False) -> None:
    """Delete an app and end its workers."""
    given = invocation(context)
    with given.client() as client:
        found = client.call("GET", path("apps", name), APP)["name"]
        question = f"Delete '{found}' with all its bundles?"
        if not yes and not given.output.confirm(question, f"Add --yes to delete '{found}' with all its bundles."):
            raise Failure("not_deleted", "Nothing was deleted; answer y, or add --yes, to delete it.")
        client.delete(path("apps", name))
    given.output.result({"deleted": found}, f"'{found}' is deleted.")


@app.command()
def update(
    context: typer.Context,
    name: AppName,
    new_name: Annotated[
        str | None, typer.Option("--name", help="A new name; the old one stays an alias.", callback=reference)
    ] = None,
    title: Annotated[str | None, typer.Option(help="The title people see.")] = None,
    description: Annotated[str | None, typer.Option(help="What the app is for.")] = None,
    access: Annotated[Literal["public", "logged_in", "acl"] | None, typer.Option(help="Who may open it.")] = None,
    memory: Annotated[str | None, typer.Option(help="Memory of each worker, like 512m; 'none': the default.")] = None,
    cpu: Annotated[str | None, typer.Option(help="Cores of each worker, like 0.5; 'none': the default.")] = None,
    max_workers: Workers = None,
    sessions_per_worker: Sessions = None,
    pre_warmed: Warm = None,
    network: Annotated[
        Literal["host", "none", "default"] | None, typer.Option(help="Its workers' network; 'default': the server's.")
    ] = None,
    backend: Annotated[
        Literal["process", "docker", "default"] | None, typer.Option(help="What runs it; 'default': the server's.")
    ] = None,
    scratch_copy: Annotated[
        bool | None, typer.Option("--scratch-copy/--no-scratch-copy", help="Run from a writable copy of the bundle.")
    ] = None,
    refresh_schedule: Annotated[str | None, typer.Option(help="When to refresh; not available yet.")] = None,
) -> None:
    """Change an app's settings.

    Limits count for workers that start from now on.
    """
    if refresh_schedule:
        raise UsedWrongly("not_available", "Scheduled refreshes are not available yet; leave --refresh-schedule out.")
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
    changes |= {
        key: None if value == "default" else value
        for key, value in (("network", network), ("backend", backend))
        if value is not None
    }
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


def _option(key: str) -> str:
    """Return what the command line calls a setting of the API."""
    return _OPTIONS.get(key, key)


def _limit(key: str, value: str | None, kind: type[str | int | float]) -> dict[str, object]:
    if value is None:
        return {}
    if value == "none":
        return {key: None}
    if kind is not str and not re.fullmatch(r"[0-9]{1,9}" if kind is int else r"[0-9]{1,9}(\.[0-9]{1,9})?", value):
        raise UsedWrongly("invalid_limit", f"'{value}' is neither a number nor 'none'; correct --{_option(key)}.")
    return {key: kind(value)}


def _change(context: typer.Context, name: str, changes: Mapping[str, object]) -> None:
    if not changes:
        raise UsedWrongly("nothing_to_change", "Name at least one setting to change; --help lists them.")
    given = invocation(context)
    try:
        with given.client() as client:
            changed = client.call("PATCH", path("apps", name), APP, changes)
    except UsedWrongly as refusal:
        words = re.sub(r"'(\w+)[^']*'", lambda key: f"'--{_option(key[1])}'", refusal.message, count=1)
        raise UsedWrongly(refusal.code, words if refusal.code == "invalid_request" else refusal.message) from refusal
    told = ", ".join(f"{_option(key)} {_setting(changed.get(key))}" for key in changes)
    given.output.result(changed, f"'{changed['name']}' is changed: {told}.")


def _setting(value: object) -> str:
    if value is None:
        return "the server's default"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value) or "empty"


@tokens_app.command("list")
def list_tokens(context: typer.Context) -> None:
    """Name your tokens, newest first."""
    given = invocation(context)
    with given.client() as client:
        found = client.call("GET", path("users", "me", "tokens"), TOKENS)
    headings = ("token", "name", "created", "expires", "last used")
    rows = [
        [one["id"], one["name"], one["created_at"], _expiry(one["expires_at"]), one["last_used_at"]]
        for one in found["tokens"]
    ]
    given.output.table(found, headings, rows, empty="No tokens.", ids={"token"})


def _expiry(moment: str) -> str:
    return f"{moment} (expired)" if moment < (rfc3339(time.time()) or "") else moment


@tokens_app.command("create")
def create_token(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="What it is for.")] = "token",
    days: Annotated[int, typer.Option(min=1, max=366, help="Days until it expires.")] = 90,
) -> None:
    """Make a token and print it, this once."""
    if not name.strip():
        raise UsedWrongly("empty_name", "Say what the token is for, by which you will know it when you revoke it.")
    given = invocation(context)
    with given.client() as client:
        made = client.call("POST", path("users", "me", "tokens"), NEW_TOKEN, {"name": name, "expires_in_days": days})
    given.output.note("Keep this token now: it is not shown again.")
    given.output.result(made, made["token"])


@tokens_app.command("revoke")
def revoke_token(
    context: typer.Context, token_id: Annotated[str, typer.Argument(metavar="ID", help="As 'by tokens list' shows it.")]
) -> None:
    """Make a token invalid at once."""
    given = invocation(context)
    with given.client() as client:
        known = _ids(client, "tokens", TOKENS, "users", "me", "tokens")
        token_id = whole_id(token_id, known, "token", "by tokens list")
        client.delete(path("users", "me", "tokens", token_id))
    given.output.result({"revoked": token_id}, "The token is revoked.")


@admin_app.command()
def check(context: typer.Context) -> None:
    """Run the start-up checks on the server and show what they found, and in a last line what apps are isolated by.

    Exit status 1 if one of them is an error: the server would not start like this.
    """
    given = invocation(context)
    with given.client() as client:
        run = client.call("POST", path("system", "checks", "run"), CHECKS)
    headings = ("check", "severity", "fact", "remedy")
    rows = [[one[key] for key in ("name", "severity", "fact", "remedy")] for one in run["checks"]]
    given.output.table(run, headings, rows, empty="The server made no checks.")
    if not given.output.as_json and (isolation := run.get("isolation")):  # an older server tells none
        given.output.result(run, isolation)
    if run["severity"] == "error":
        raise Failure("check_failed", "The server would not start like this; see the checks that are errors.")


@admin_app.command()
def status(context: typer.Context) -> None:
    """Show daemons, workers and limits."""
    given = invocation(context)
    with given.client() as client:
        found = client.call("GET", path("system", "status"), STATUS)
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
    given.output.record(found, fields)


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
            value = next(left, "-")
            if value.startswith("-"):  # no address and no token does; Typer misses the value of what is last
                return [*front, *(word for word in (value, *left) if word == "--json"), argument]
            front += [argument, value]
        else:
            rest.append(argument)
    return front + rest


def _prepare_standard_streams() -> None:
    """Open those that this process was started without: no other file may get their numbers, and what is said there.

    What apps write is UTF-8; where the output's encoding lacks a character, an escape stands for it.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115 - stays open to the end
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def main() -> None:
    """Run `by`."""
    _prepare_standard_streams()
    arguments = _hoisted(sys.argv[1:])
    as_json = "--json" in itertools.takewhile(lambda argument: argument != "--", arguments)
    ended: Failure
    try:
        # What is wrong with the words of a command, Typer tells people by itself, with the command's usage.
        sys.exit(app(arguments, standalone_mode=not as_json))
    except typer.TyperException as error:
        ended = UsedWrongly("used_wrongly", error.format_message())
    except Failure as failure:
        ended = failure
    except UnicodeEncodeError:  # nothing but bytes of the command line that Python could not decode
        ended = UsedWrongly("not_text", "A value on the command line is no UTF-8; write it in UTF-8.")
    except OSError as error:
        # What is still in the buffer would fail once more when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        where = error.filename or "Standard output"
        ended = Failure("cannot_write", f"{where} cannot be used ({error.strerror}); make room, or name another place.")
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    with suppress(OSError):  # standard error may be full, too
        Output(as_json=as_json).failure(ended.code, ended.message)
    sys.exit(ended.exit_status)
