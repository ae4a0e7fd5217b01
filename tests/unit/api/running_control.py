"""The whole daemon but for its listeners, wired by the real composition root, with a fake spawner behind it."""

import asyncio
import contextlib
import inspect
import itertools
import secrets
import shutil
import tempfile
import time
from pathlib import Path

from fake_spawner import FakeSpawner

from blockyard_api import app, settings
from blockyard_api.host.notify import ServiceManager
from blockyard_api.relay.gate import Forward, RequestHead
from blockyard_api.workers.life import State

HOST = b"127.0.0.1:8081"
ORIGIN = b"http://127.0.0.1:8081"


class Clock:
    """The daemon's time passes as a test lets it, so that a machine that stalls changes no outcome.

    The event loop's own timers also have real time: what is under way in this very process waits for that.
    """

    def __init__(self, monkeypatch):
        self._ahead = 0.0
        real, ticks = time.monotonic, itertools.count()
        for name in ("monotonic", "time"):
            monkeypatch.setattr(time, name, self._standing(getattr(time, name)(), ticks))
        monkeypatch.setattr(asyncio.BaseEventLoop, "time", lambda loop: real() + self._ahead)

    def _standing(self, since, ticks):
        # a microsecond a look: of two things in a row, the later one is the newer
        return lambda: since + self._ahead + next(ticks) / 1e6

    async def advance(self, seconds):
        """Let time pass, and what is due then happen."""
        self._ahead += seconds
        for _ in range(3):
            await asyncio.sleep(0)


async def until(condition, what="the condition"):
    """Wait for what is under way in this very process; a test that fails waits 5 s, any other some milliseconds."""
    for _ in range(1000):
        if result := condition():
            return result
        await asyncio.sleep(0.005)
    raise AssertionError(f"{what} did not come about")


class Answer:
    """What the gate decided, and what a browser would make of it."""

    def __init__(self, verdict, gate):
        self.verdict = verdict
        self._gate = gate
        self.forwarded = isinstance(verdict, Forward)
        self.headers = verdict.response_headers if self.forwarded else verdict.headers
        self.tracker = verdict.tracker if self.forwarded else None

    @property
    def status(self):
        return None if self.forwarded else self.verdict.status

    @property
    def text(self):
        return self.verdict.body.decode()

    @property
    def cookie(self):
        for name, value in self.headers:
            if name == b"Set-Cookie":
                return value.split(b";")[0].partition(b"=")[2]
        return None

    @property
    def identity(self):
        return dict(self.verdict.headers)

    def end(self):
        """The exchange is over, as the relay tells it."""
        if self.tracker is not None:
            self.tracker.request_ended()
        return self

    def open(self):
        """The upgrade succeeded; returns the list in which an end of the WebSocket is noted."""
        ends = []

        def close():
            if not ends:
                ends.append("closed")
                self.tracker.request_ended()

        self.tracker.websocket_opened(close)
        return ends


def head(
    path, cookie=None, *, method=b"GET", client="192.0.2.1", html=False, websocket=False, origin=ORIGIN, host=HOST,
    cookie_name=b"blockyard_route", **more,
):  # fmt: skip
    """Return a parsed request as the relay hands it to the gate."""
    fields = [(b"Host", host), (b"User-Agent", b"test")]
    if cookie is not None:
        fields.append((b"Cookie", b"other=1; %b=%b" % (cookie_name, cookie)))
    if html:
        fields.append((b"Accept", b"text/html,*/*;q=0.8"))
    if websocket:
        fields.append((b"Origin", origin))
    fields += [(name.replace("_", "-").encode(), value) for name, value in more.items()]
    return RequestHead(method, path.encode("latin-1"), fields, client, secure=False, websocket=websocket)


class Control:
    """A running daemon; `gate` is what the relay would ask, `services` what the routes would."""

    def __init__(self, template, lines=""):
        self.root = Path(tempfile.mkdtemp(prefix="by-"))
        self.state = self.root / "state"
        self.state.mkdir()
        shutil.copy(template, self.state / "blockyard.db")
        self.spawner = FakeSpawner(self.root / "s.sock", self.root / "run")
        sections = {
            "storage": [f'state_dir = "{self.state}"'],
            "process": [
                f'spawner_socket = "{self.spawner.path}"',
                f'runtime_dir = "{self.spawner.runtime_dir}"',
                "skip_metadata_check = true",
            ],
            "proxy": [],
            "server": [],
        }
        for line in lines.strip().splitlines():
            key, _, value = line.partition("=")
            section, _, name = key.strip().partition(".")
            sections.setdefault(section, []).append(f"{name} = {value.strip()}")
        file = self.root / "blockyard.toml"
        file.write_text("".join(f"[{name}]\n" + "\n".join(each) + "\n" for name, each in sections.items()))
        self.settings = settings.load(str(file), {})
        self._clients = 0

    async def start(self):
        self.spawner.start()
        await self.start_daemon()
        await self.services.tokens.first_admin()
        return self

    async def start_daemon(self, *, adopted=True):
        built = asyncio.get_running_loop().create_future()
        self._leave = asyncio.Event()
        self._host = asyncio.create_task(self._run(built))
        await asyncio.wait([built, self._host], return_when=asyncio.FIRST_COMPLETED)
        if self._host.done():
            await self._host
        self.gate = built.result().relay.gate
        self.asgi = built.result().control_plane
        self.services = self.asgi.state.services
        self.fleet = self.services.fleet
        self.sessions = self.services.sessions
        self.catalog = self.services.catalog
        if adopted:
            await until(self.fleet.adopted.is_set, "adoption")

    async def _run(self, built):
        async with app.running(self.settings, ServiceManager({}), {}) as running:
            built.set_result(running)
            await self._leave.wait()

    async def stop_daemon(self):
        """End it; raises whatever took it down."""
        self._leave.set()
        await self._host

    async def close(self):
        with contextlib.ExitStack() as last:
            last.callback(shutil.rmtree, self.root)
            await self.stop_daemon()
            await self.spawner.close()

    @property
    def alive(self):
        return not self._host.done()

    # --- what a deployer does

    async def app(self, name="plain", **changes):
        """Make a public app with a bundle."""
        made = await self.catalog.create(name, "admin")
        await self.catalog.change(made, {"access_type": "public", **changes})
        return await self.deploy(name)

    async def deploy(self, name):
        changed = await self.catalog.change(self.catalog.named(name), {"active_bundle": secrets.token_hex(16)})
        self.fleet.settle(changed)
        self.fleet.reconcile(changed.id)
        return changed

    async def change(self, app_name, **changes):
        changed = await self.catalog.change(self.catalog.named(app_name), changes)
        self.fleet.reconcile(changed.id)
        return changed

    # --- what a visitor does

    async def ask(self, path, cookie=None, **more):
        """Ask the gate as one new client address each time, unless one is given."""
        self._clients += 1
        client = f"198.51.{self._clients >> 8 & 255}.{self._clients & 255}"
        verdict = self.gate.admit(head(path, cookie, **{"client": client, **more}))
        if inspect.isawaitable(verdict):
            verdict = await verdict
        return Answer(verdict, self.gate)

    async def visit(self, name="plain", **more):
        """Open an app's page for the first time, and be served."""
        answer = await self.ask(f"/app/{name}/", **more)
        assert answer.forwarded, answer.text
        return answer.end()

    async def socket(self, name, cookie, **more):
        """Open the page's WebSocket; returns the answer and the list of its ends."""
        answer = await self.ask(f"/app/{name}/websocket/", cookie, websocket=True, **more)
        assert answer.forwarded, answer.text
        return answer, answer.open()

    def worker_of(self, answer):
        return next(worker for worker in self.fleet.all() if worker.socket is answer.verdict.upstream)

    async def quiet(self):
        """Wait until no worker is on its way up or down."""
        settled = (State.ACTIVE, State.DRAINING)

        def still():
            workers = self.fleet.all()
            resting = all(worker.state in settled and not worker.over.done() for worker in workers)
            return resting and len(self.fleet.lives()) == len(workers)  # what ended has been written down, too

        await until(still, "quiet")
