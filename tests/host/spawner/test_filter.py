"""The system call filter at work: what a worker tries and does not get, and all that R does and does get."""

import ctypes
import json
import signal
import subprocess
from pathlib import Path

import pytest
from running_spawner import eventually
from websockets.sync.client import unix_connect

HERE = Path(__file__).parent
SHINY_EXAMPLES = Path("/usr/lib/R/site-library/shiny/examples")
NEWUSER, NEWNS = 0x10000000, 0x00020000
VSOCK, PACKET, ALG, KEY, NETLINK, INET, INET6, UNIX = 40, 17, 38, 15, 16, 2, 10, 1
STREAM, DGRAM, RAW, CLOEXEC = 1, 2, 3, 0o2000000

# What is tried → the call, its arguments, its answer under the filter, its answer without (None: the kernel's matter).
TRIED = {
    "unshare -U": ("unshare", [NEWUSER], "EPERM", "ENOSPC"),  # ENOSPC: --disable-userns, the next layer
    "clone, new user namespace": ("clone", [NEWUSER | signal.SIGCHLD, 0, 0, 0, 0], "EPERM", "ENOSPC"),
    "clone3": ("clone3", [0, 0], "ENOSYS", "EINVAL"),
    "unshare(0)": ("unshare", [0], "EPERM", "done"),
    "setns": ("setns", [0, 0], "EPERM", "EINVAL"),
    "mount": ("mount", ["none", "/tmp", "tmpfs", 0, 0], "EPERM", "EPERM"),  # the same: it has no capability
    "open_tree": ("open_tree", [-100, "/", 0], "EPERM", "done"),
    "chroot": ("chroot", ["/"], "EPERM", "EPERM"),
    "keyctl": ("keyctl", [0, -3 & 0xFFFFFFFF, 1], "EPERM", "done"),  # the session's keyring
    "add_key": ("add_key", ["user", "blockyard", "x", 1, -4 & 0xFFFFFFFF], "EPERM", "done"),  # the uid's keyring
    "request_key": ("request_key", ["user", "blockyard", 0, 0], "EPERM", "done"),  # finds what add_key left
    "bpf": ("bpf", [0, 0, 0], "EPERM", None),
    "perf_event_open": ("perf_event_open", [0, 0, -1, -1, 0], "EPERM", "EFAULT"),
    "userfaultfd": ("userfaultfd", [1], "EPERM", "done"),
    "io_uring_setup": ("io_uring_setup", [0, 0], "EPERM", "EFAULT"),
    "ptrace": ("ptrace", [0, 0, 0, 0], "EPERM", "done"),
    "process_vm_readv": ("process_vm_readv", [1, 0, 0, 0, 0, 0], "EPERM", "done"),
    "pidfd_getfd": ("pidfd_getfd", [-1, 0, 0], "EPERM", "EBADF"),
    "kcmp": ("kcmp", [1, 1, 0, 0, 0], "EPERM", None),
    "open_by_handle_at": ("open_by_handle_at", [-1, 0, 0], "EPERM", None),
    "fanotify_init": ("fanotify_init", [0x200, 0], "EPERM", None),
    "personality, no randomization": ("personality", [0x40000], "EPERM", "done"),
    "personality, asking": ("personality", [0xFFFFFFFF], "done", "done"),
    "socket, vsock": ("socket", [VSOCK, STREAM, 0], "EPERM", None),
    "socket, packet": ("socket", [PACKET, RAW, 0], "EPERM", "EPERM"),
    "socket, alg": ("socket", [ALG, 5, 0], "EPERM", None),
    "socket, key": ("socket", [KEY, RAW, 2], "EPERM", None),
    "socket, raw": ("socket", [INET, RAW, 1], "EPERM", "EPERM"),
    "socket, raw and more": ("socket", [INET, RAW | CLOEXEC, 1], "EPERM", "EPERM"),
    "socket, netlink audit": ("socket", [NETLINK, RAW, 9], "EPERM", None),
    "socket, netlink kobject": ("socket", [NETLINK, RAW, 15], "EPERM", "done"),
    "socket, netlink route": ("socket", [NETLINK, RAW | CLOEXEC, 0], "done", "done"),
    "socket, ping": ("socket", [INET, DGRAM, 1], "EPERM", None),
    "socket, mptcp": ("socket", [INET, STREAM, 262], "EPERM", None),
    "socket, sctp": ("socket", [INET, STREAM, 132], "EPERM", None),
    "socket, udp-lite": ("socket", [INET6, DGRAM | CLOEXEC, 136], "EPERM", None),
    "socket, udp": ("socket", [INET6, DGRAM | CLOEXEC, 17], "done", "done"),
    "socket, tcp": ("socket", [INET, STREAM | CLOEXEC, 6], "done", "done"),
    "socket, unix": ("socket", [UNIX, DGRAM, 0], "done", "done"),
    "a call that no kernel has": (999, [], "ENOSYS", "ENOSYS"),
}
OTHERS = {  # by which forbidden_calls.py knows them → the same two answers
    "TIOCSTI": ("EPERM", None),  # without: done, or EIO where dev.tty.legacy_tiocsti is 0
    "TIOCSTI, more than 32 bits": ("EPERM", None),
    "int 0x80": ("SIGSYS", "exit 7"),
}


def number(call):
    if isinstance(call, int):
        return call
    return ctypes.CDLL("libseccomp.so.2").seccomp_syscall_resolve_name(call.encode())


def answers(spawner):
    """What each call is answered in a worker of a running spawner."""
    calls = {what: [number(call), *arguments] for what, (call, arguments, *_) in TRIED.items()}
    files = {"app.R": 'system("/usr/bin/python3 -I forbidden_calls.py calls.json")', "calls.json": json.dumps(calls)}
    bundle = spawner.bundle("calls", {**files, "forbidden_calls.py": (HERE / "forbidden_calls.py").read_text()})
    client = spawner.client()
    worker = spawner.spawn(client, "worker0001", bundle)
    worker.wait_for_output("CALLS ")
    return json.loads(worker.output().partition("CALLS ")[2].splitlines()[0])


def test_each_forbidden_call_gets_the_answer_of_the_policy(spawner):
    wanted = {what: filtered for what, (_, _, filtered, _) in TRIED.items()}
    wanted |= {what: filtered for what, (filtered, _) in OTHERS.items()}
    assert answers(spawner) == wanted


def test_without_the_filter_the_same_calls_do_their_work_or_meet_the_next_layer(stopped_spawner):
    stopped_spawner.configure(seccomp_profile="")
    stopped_spawner.start()
    wanted = {what: bare for what, (_, _, _, bare) in TRIED.items() if bare}
    wanted |= {what: bare for what, (_, bare) in OTHERS.items() if bare}
    got = answers(stopped_spawner)
    assert {what: got[what] for what in wanted} == wanted
    # On a kernel without one of these it is ENOSYS or the like; refused by the filter alone is what none of them is.
    assert got["TIOCSTI"] in ("done", "EIO")
    assert got["TIOCSTI, more than 32 bits"] == got["TIOCSTI"]


def test_everything_in_the_box_is_filtered_its_first_process_too(spawner, client):
    code = """
      for (pid in grep("^[0-9]+$", list.files("/proc"), value = TRUE))
        cat("IS", readLines(file.path("/proc", pid, "comm")),
            grep("^Seccomp:", readLines(file.path("/proc", pid, "status")), value = TRUE), "\\n")
      quit()"""
    worker = spawner.run_r(client, "worker0001", code)
    spawner.result(client, worker.id)
    seen = [line.split()[1:] for line in worker.output().splitlines() if line.startswith("IS")]
    assert sorted(seen) == [["R", "Seccomp:", "2"], ["bwrap", "Seccomp:", "2"]]


def test_a_truncated_filter_lets_no_worker_run(stopped_spawner):
    file = Path(str(stopped_spawner.settings["seccomp_profile"]))
    file.write_bytes(file.read_bytes()[:-4])
    stopped_spawner.start()
    client = stopped_spawner.client()
    worker = stopped_spawner.run_r(client, "worker0001", "message('it ran')")
    assert stopped_spawner.result(client, worker.id)["status"] == 1
    assert "seccomp" in worker.output().lower()
    assert "it ran" not in worker.output()


def test_the_filter_is_read_at_the_start_and_the_file_may_go(spawner, client):
    Path(str(spawner.settings["seccomp_profile"])).unlink()
    code = "cat(grep('^Seccomp:', readLines('/proc/self/status'), value = TRUE)); quit()"
    worker = spawner.run_r(client, "worker0001", code)
    spawner.result(client, worker.id)
    assert worker.output().split() == ["Seccomp:", "2"]


def test_what_r_programs_do_works_under_the_filter(spawner, client):
    work = (HERE / "what_r_does.R").read_text()
    worker = spawner.run_r(client, "worker0001", work)
    spawner.result(client, worker.id)
    output = worker.output()
    did = dict(line.removeprefix("DID ").split(": ", 1) for line in output.splitlines() if line.startswith("DID"))
    assert "FINISHED" in output, output
    assert {name: how for name, how in did.items() if how != "yes"} == {}, output
    assert len(did) == work.count('\nreport("')


# tools::testInstalledBasic() looks for R's tests in R's own directory, where Debian does not put them. They are copied
# to where they can be written to, since each writes its output beside itself.
BASIC = """
dir.create("/tmp/R"); invisible(file.copy("/app/tests", "/tmp/R", recursive = TRUE))
run <- tools::testInstalledBasic
# Half of the time of all of them goes into installing packages, which no app does.
cat("", file = "/tmp/R/tests/reg-packages.R"); unlink("/tmp/R/tests/reg-packages.Rout.save")
around <- new.env(parent = environment(run))
around$R.home <- function(component = "home") if (component == "home") "/tmp/R" else base::R.home(component)
environment(run) <- around
run("basic")
cat("FINISHED\n")
quit()
"""


@pytest.mark.timeout(900)
def test_rs_own_tests_pass_under_the_filter(spawner, client, tmp_path):
    archive = subprocess.run(
        [HERE / "r-tests"], stdout=subprocess.PIPE, text=True, check=True, timeout=300
    ).stdout.strip()
    (tmp_path / "app.R").write_text(BASIC)
    subprocess.run(["tar", "--extract", "--file", archive, "--directory", tmp_path, "--no-same-owner"], check=True)
    worker = spawner.spawn(client, "worker0001", spawner.bundle("r-tests", tmp_path))
    eventually(lambda: not worker.reader.is_alive(), "the tests end", worker.output, seconds=850)
    told = worker.output()
    assert "FINISHED" in told, told
    assert "FAILED" not in told, told
    # The last but one. Its output differs on Debian outside of a sandbox, too, by a warning of the package Matrix, and
    # that ends the run.
    assert "running code in \u2018reg-S4.R\u2019" in told, told


# Of the examples of R's packages those that start processes, draw, or read and write files: what else R computes, its
# own tests compute as well. Not grDevices: a minute of font tables, and the devices are above.
EXAMPLES = [("methods", "graphics", "grid"), ("parallel", "tools", "utils")]


@pytest.mark.timeout(300)
def test_the_examples_of_rs_own_packages_run_under_the_filter(spawner, client):
    def code(packages):
        vector = ", ".join(f'"{name}"' for name in packages)
        each = 'cat("RESULT", name, tools::testInstalledPackage(name, types = "examples", outDir = "/tmp"), "\\n")'
        return f"for (name in c({vector})) {each}\nquit()"

    workers = [spawner.run_r(client, f"worker{at:04}", code(packages)) for at, packages in enumerate(EXAMPLES)]
    results = {}
    for worker in workers:
        eventually(
            lambda worker=worker: not worker.reader.is_alive(), "the examples end", worker.lines.__str__, seconds=250
        )
        results |= dict(line.split()[1:] for line in worker.output().splitlines() if line.startswith("RESULT"))
    assert results == {name: "0" for packages in EXAMPLES for name in packages}, [each.output() for each in workers]


def test_shinys_own_examples_are_served_and_draw_under_the_filter(spawner, client):
    names = sorted(path.name for path in SHINY_EXAMPLES.iterdir())
    assert len(names) >= 11
    for name in names:
        worker = spawner.spawn(client, f"worker{name}".replace("_", "0"), spawner.bundle(name, SHINY_EXAMPLES / name))
        page = worker.get()
        assert page.startswith("HTTP/1.1 200 OK"), (name, worker.lines)
        assert "shiny" in page, name
        client.call("stop", id=worker.id, grace=0)


@pytest.mark.parametrize(("name", "output"), [("01_hello", "distPlot"), ("04_mpg", "mpgPlot")])
def test_a_plot_of_shinys_examples_reaches_the_browser(spawner, client, name, output):
    worker = spawner.spawn(client, "worker0001", spawner.bundle(name, SHINY_EXAMPLES / name))
    worker.connect().close()
    size = {f".clientdata_output_{output}_{side}": 400 for side in ("width", "height")}
    data = {**size, f".clientdata_output_{output}_hidden": False, ".clientdata_pixelratio": 1}
    inputs = {"bins:shiny.number": 20, "variable": "cyl", "outliers": True}
    with unix_connect(str(worker.socket), "ws://app/websocket/") as socket_:
        socket_.send(json.dumps({"method": "init", "data": {**data, ".clientdata_url_search": "", **inputs}}))
        for _ in range(20):
            if "data:image/png;base64" in str(socket_.recv(20)):
                break
        else:
            pytest.fail("no plot came")
