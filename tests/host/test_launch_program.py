"""The program that R runs in a worker, with real R on a real Unix socket; the sandbox is another test's subject."""

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from websockets.sync.client import ClientConnection, unix_connect

import blockyard_spawner

PROGRAM = Path(blockyard_spawner.__file__).parent / "sandboxed" / "launch.R"
EXAMPLES = Path(__file__).parents[2] / "examples"
PAGE = 'shinyApp(fluidPage("the page"), function(input, output, session) {})'
DEADLINE = 30.0


@dataclass
class Program:
    """One run of the launch program: its process, its socket, and what it wrote."""

    process: subprocess.Popen[bytes]
    socket: Path
    log: Path

    def output(self) -> str:
        return self.log.read_text()

    def connect(self) -> socket.socket:
        """Connect as soon as the app listens; a program that ends instead fails the test with its output."""
        end = time.monotonic() + DEADLINE
        while time.monotonic() < end and self.process.poll() is None:
            connection = socket.socket(socket.AF_UNIX)
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                connection.connect(str(self.socket))
                connection.settimeout(DEADLINE)
                return connection
            connection.close()
            time.sleep(0.01)
        pytest.fail(f"the app never listened; it wrote: {self.output()}")

    def get(self, path: str = "/") -> str:
        """Return a whole response, head included."""
        with self.connect() as connection:
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n".encode())
            return b"".join(iter(lambda: connection.recv(65536), b"")).decode()

    @contextlib.contextmanager
    def session(self, **inputs: str) -> Iterator[ClientConnection]:
        """Open a page's WebSocket and wait until its session has started."""
        place = {f".clientdata_url_{part}": "" for part in ("protocol", "hostname", "port", "pathname", "search")}
        with unix_connect(sock=self.connect(), uri="ws://test/websocket/", proxy=None) as websocket:
            websocket.send(json.dumps({"method": "init", "data": place | inputs}))
            while "inputMessages" not in websocket.recv(DEADLINE):
                pass
            yield websocket

    def interrupt(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(DEADLINE)


class Launcher:
    """Starts the program on bundles made for one test."""

    def __init__(self, tmp_path: Path, stack: contextlib.ExitStack) -> None:
        self.tmp_path = tmp_path
        self.stack = stack

    def bundle(self, files: dict[str, str]) -> Path:
        """Write a bundle as the server keeps it: files 0644, directories 0755."""
        root = self.tmp_path / "bundle"
        for name, text in files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return root

    def start(self, bundle: Path | dict[str, str], **environment: str) -> Program:
        directory = bundle if isinstance(bundle, Path) else self.bundle(bundle)
        temporary = self.tmp_path / "tmp"
        temporary.mkdir(exist_ok=True)
        path, log = self.tmp_path / "app.sock", self.tmp_path / "log"
        arguments = ["R", "--no-echo", "--no-restore", "--no-save", "--no-init-file", f"--file={PROGRAM}"]
        base = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "TMPDIR": str(temporary), "BLOCKYARD_SOCKET": str(path)}
        with log.open("wb") as output:
            process = subprocess.Popen(
                arguments, cwd=directory, env=base | environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
        self.stack.callback(process.wait, DEADLINE)
        self.stack.callback(process.kill)
        return Program(process, path, log)


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Launcher]:
    with contextlib.ExitStack() as stack:
        yield Launcher(tmp_path, stack)


def test_an_app_answers_on_its_socket_which_its_group_may_use_and_nobody_else(launcher: Launcher) -> None:
    program = launcher.start(EXAMPLES / "hello")
    assert "Hello from Blockyard" in program.get()
    assert stat.S_IMODE(program.socket.stat().st_mode) == 0o660


def test_a_directory_is_run_whole_with_global_r_the_r_directory_and_www(launcher: Launcher) -> None:
    program = launcher.start(EXAMPLES / "split")
    assert "First half" in program.get()
    assert "#summary" in program.get("/style.css")
    with program.session() as websocket:
        websocket.send(
            json.dumps({"method": "update", "data": {"period": "1", ".clientdata_output_summary_hidden": False}})
        )
        while "144 years" not in (message := websocket.recv(DEADLINE)):
            assert "errors" not in message or '"errors":{}' in message


def test_the_upload_example_starts(launcher: Launcher) -> None:
    assert "Summary of a CSV file" in launcher.start(EXAMPLES / "upload").get()


@pytest.mark.parametrize("names", [("APP.r",), ("Server.R", "UI.r")])
def test_the_names_of_the_entry_files_may_be_written_in_any_case(launcher: Launcher, names: tuple[str, ...]) -> None:
    texts = {"APP.r": PAGE, "Server.R": "function(input, output) {}", "UI.r": 'fluidPage("the page")'}
    assert "the page" in launcher.start({name: texts[name] for name in names}).get()


@pytest.mark.parametrize("there", [True, False], ids=["with the file", "without the file"])
@pytest.mark.parametrize(
    "activation", ['source("renv/activate.R")', 'source(file.path(getwd(), "renv", "activate.R"), local = TRUE)']
)
def test_a_profile_counts_but_does_not_activate_renv(launcher: Launcher, activation: str, there: bool) -> None:
    files = {
        ".Rprofile": f'{activation}\nsource("greeting.R")\n.First <- function() Sys.setenv(FIRST = "ran")\n',
        "greeting.R": 'options(greeting = "from the profile")',
        "app.R": 'page <- fluidPage(getOption("greeting"), Sys.getenv("FIRST"), toString(search()))\n'
        "shinyApp(page, function(input, output) {})",
    }
    if there:
        files["renv/activate.R"] = 'stop("renv was activated")'
    page = launcher.start(files).get()
    assert "from the profile" in page
    assert "ran" in page
    assert "blockyard" not in page


def test_an_app_finds_an_empty_global_environment(launcher: Launcher) -> None:
    app = 'shinyApp(fluidPage(paste0("[", toString(ls(globalenv())), "]")), function(input, output) {})'
    assert "[]" in launcher.start({"app.R": app}).get()


def test_a_stray_plot_opens_no_file(launcher: Launcher) -> None:
    bundle = launcher.bundle({"app.R": f"plot(1:10); dev.new(); dev.off()\n{PAGE}"})
    program = launcher.start(bundle)
    assert "the page" in program.get()
    assert program.interrupt() == 0
    assert sorted(path.name for path in bundle.iterdir()) == ["app.R"]


def test_an_interrupt_ends_the_sessions_before_the_app_and_then_leaves_cleanly(launcher: Launcher) -> None:
    server = 'session$onSessionEnded(function() message("the session ended"))'
    app = (
        'onStop(function() message("the app stopped"))\n'
        f'shinyApp(fluidPage("x"), function(input, output, session) {{ {server} }})'
    )
    program = launcher.start({"app.R": app})
    with program.session():
        assert program.interrupt() == 0
    words = program.output()
    assert words.index("the session ended") < words.index("the app stopped")
    assert words.count("the session ended") == 1
    assert not program.socket.exists()


def test_an_interrupt_while_the_app_is_still_loading_is_a_clean_end(launcher: Launcher) -> None:
    program = launcher.start({"app.R": f'writeLines("loading", "{launcher.tmp_path}/mark")\nSys.sleep(60)\n{PAGE}'})
    end = time.monotonic() + DEADLINE
    while not (launcher.tmp_path / "mark").exists() and time.monotonic() < end:
        time.sleep(0.01)
    assert program.interrupt() == 0


def test_an_error_in_the_app_is_r_s_own_message_and_a_failure(launcher: Launcher) -> None:
    program = launcher.start({"app.R": "library(shiny)\nno_such_function(1)"})
    assert program.process.wait(DEADLINE) == 1
    assert 'could not find function "no_such_function"' in program.output()
    assert not program.socket.exists()


@pytest.mark.parametrize(
    "ending",
    ["runApp(shinyApp(ui, server))", "shiny::runApp(list(ui = ui, server = server), port = 0, launch.browser = TRUE)"],
)
def test_an_app_that_runs_itself_is_told_what_to_write_instead(launcher: Launcher, ending: str) -> None:
    program = launcher.start({"app.R": f'ui <- fluidPage("x"); server <- function(input, output) {{}}\n{ending}'})
    assert program.process.wait(DEADLINE) == 1
    assert "end app.R with shinyApp(ui, server)" in program.output()


def test_what_the_app_prints_is_there_at_once(launcher: Launcher) -> None:
    program = launcher.start({"app.R": f'message("to standard error"); cat("to standard output\\n")\n{PAGE}'})
    program.get()
    assert "to standard error" in program.output()
    assert "to standard output" in program.output()


def test_a_socket_left_by_an_earlier_run_is_replaced(launcher: Launcher, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as earlier:
        earlier.bind(str(tmp_path / "app.sock"))
    assert "the page" in launcher.start({"app.R": PAGE}).get()


def test_a_scratch_copy_can_be_written_and_the_bundle_stays_as_it_was(launcher: Launcher) -> None:
    bundle = launcher.bundle(
        {"app.R": f'writeLines(readLines("data/in.txt"), "data/out.txt")\n{PAGE}', "data/in.txt": "x"}
    )
    (bundle / ".hidden").write_text("kept")
    (bundle / "loop").symlink_to(".")
    program = launcher.start(bundle, BLOCKYARD_SCRATCH="1")
    assert "the page" in program.get()
    assert not (bundle / "data/out.txt").exists()
    (copy,) = (launcher.tmp_path / "tmp").glob("app-*")
    assert (copy / "data/out.txt").read_text() == "x\n"
    assert (copy / ".hidden").read_text() == "kept"
    assert (copy / "loop").is_symlink()
    assert stat.S_IMODE(copy.stat().st_mode) == 0o700


def test_a_scratch_copy_that_does_not_fit_is_said_so(launcher: Launcher, tmp_path: Path) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(temporary)], check=True)
    try:
        program = launcher.start({"app.R": PAGE, "data": "x" * (1 << 20)}, BLOCKYARD_SCRATCH="1")
        assert program.process.wait(DEADLINE) == 1
    finally:
        subprocess.run(["umount", str(temporary)], check=True)
    assert "give it a larger /tmp" in program.output()


def test_a_bookmark_on_the_server_does_not_need_the_bundle(launcher: Launcher) -> None:
    app = (
        'enableBookmarking("server")\n'
        'ui <- function(request) fluidPage(textInput("word", "Word", "first"))\n'
        "server <- function(input, output, session) {\n"
        '  onBookmarked(function(url) message("bookmark ", url))\n'
        "  observeEvent(input$word, session$doBookmark(), ignoreInit = TRUE)\n"
        "}\nshinyApp(ui, server)"
    )
    bundle = launcher.bundle({"app.R": app})
    program = launcher.start(bundle)
    with program.session(word="first") as websocket:
        websocket.send(json.dumps({"method": "update", "data": {"word": "second"}}))
        end = time.monotonic() + DEADLINE
        while "bookmark " not in program.output() and time.monotonic() < end:
            time.sleep(0.01)
    query = program.output().partition("bookmark ")[2].partition("?")[2].split()[0]
    assert 'value="second"' in program.get(f"/?{query}")
    assert sorted(path.name for path in bundle.iterdir()) == ["app.R"]
