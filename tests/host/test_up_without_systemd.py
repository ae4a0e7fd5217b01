"""`scripts/up` where systemd is not PID 1: whom it trusts, what it says, and what its end leaves."""

import re
import signal
import subprocess

import pytest
from fresh_machine import CHECKOUT, CONFIG, PATIENCE, STATE, UP, FreshMachine, wait_for

DAEMONS = "^/opt/blockyard/venv/bin/python[0-9]* /opt/blockyard/venv/bin/blockyard-"
SUPERVISOR = "scripts/foreground"
ROOM = "/run/blockyard/workers"
HELLO = "http://127.0.0.1:8081/app/hello/"

pytestmark = pytest.mark.timeout(400 * PATIENCE)


@pytest.fixture
def machine(tmp_path):
    made = FreshMachine(tmp_path)
    yield made
    made.close()


@pytest.fixture
def up(machine):
    """The pair, running in the foreground."""
    return machine.up().wait_until_ready()


@pytest.mark.parametrize(("key", "port"), [("server.bind", 8080), ("proxy.bind", 8081)])
def test_a_stranger_at_the_address_is_named_and_gets_no_token(machine, key, port):
    with machine.stranger(f"127.0.0.1:{port}") as asked:
        up = machine.up()
        assert up.ended() == 1
        assert asked() == "listening\n"
    assert f"Another program listens at {key} = 127.0.0.1:{port}" in up.printed()
    assert "journalctl" not in up.printed()
    assert machine.pids(DAEMONS) == []


def test_daemons_that_do_not_start_say_why_and_end_it_at_once(machine):
    machine.write(CONFIG, '[process]\nseccomp_profile = "/nowhere"\n')
    up = machine.up()
    assert up.ended() == 1
    assert "'process.seccomp_profile' cannot be read" in up.printed()
    assert up.printed().endswith("scripts/up: it has not started; the reason is above\n")
    assert machine.pids(DAEMONS) == []


def test_it_serves_at_the_configured_address_and_leaves_nothing_after_ctrl_c_and_removal(machine):
    machine.write(CONFIG, '[server]\nbind = "127.0.0.1:8090"\n')
    up = machine.up().wait_until_ready()
    assert "the API            http://127.0.0.1:8090\n" in up.printed()
    assert "not at server.bind" not in up.printed()
    assert machine.status("http://127.0.0.1:8090/app/hello/") == "200"
    assert up.interrupt() == 0
    assert machine.pids(f"{DAEMONS}|bwrap|{SUPERVISOR}") == []
    assert ROOM not in machine.read("/proc/self/mounts")
    removed = machine.up("--remove")
    assert removed.ended() == 0
    assert "blockyard, its owner, and blockyard-docker" in removed.printed()
    assert not machine.has("/opt/blockyard")
    assert not machine.has("/run/blockyard")
    assert machine.has(STATE / "blockyard.db")


def test_on_a_terminal_an_entry_for_the_journal_is_its_sentence_alone(machine):
    on_terminal = machine.up(terminal=True).wait_until_ready()
    assert "blockyard-spawner: Started, with a seccomp filter" in on_terminal.printed()
    assert "MESSAGE_ID" not in on_terminal.printed()
    assert on_terminal.interrupt() == 0


def test_while_it_runs_nothing_is_replaced_or_removed_under_it_nor_is_told_of_what_is_gone(machine, up):
    assert '"MESSAGE_ID"' in up.printed()  # for whoever collects logs
    again = machine.up()
    assert again.ended() == 0
    assert "http://127.0.0.1:8080" in again.printed()
    code = CHECKOUT / "blockyard_api" / "__init__.py"
    machine.write(code, machine.read(code) + "\n")
    installed = machine.read("/opt/blockyard/venv/code.sha256")
    after_a_change = machine.up()
    assert after_a_change.ended() == 1
    assert "end it there with Ctrl-C" in after_a_change.printed()
    assert machine.read("/opt/blockyard/venv/code.sha256") == installed
    removal = machine.up("--remove")
    assert removal.ended() == 1
    assert "it runs in the foreground" in removal.printed()
    assert machine.status(HELLO) == "200"
    assert up.interrupt() == 0
    machine.up().wait_until_ready()
    assert machine.read("/opt/blockyard/venv/code.sha256") != installed
    without_its_example(machine)


def without_its_example(machine):
    """Nothing is said of an example that was deleted."""
    token = f"BLOCKYARD_TOKEN={machine.read(STATE / 'admin-token').strip()}"
    machine.run("env", token, "by", "deploy", CHECKOUT / "examples/hello", "--name", "mine", "--yes")
    machine.run("env", token, "by", "delete", "hello", "--yes")
    again = machine.up()
    assert again.ended() == 0
    assert "by login" in again.printed()
    assert "hello" not in again.printed()


def test_daemons_die_with_their_supervisor_and_the_next_one_goes_on_or_what_it_left_is_removed(machine, up):
    assert machine.status(HELLO) == "200"
    workers = machine.pids("^/usr/bin/bwrap")
    machine.signal(signal.SIGKILL, SUPERVISOR)
    assert up.ended(20) == 128 + signal.SIGKILL
    wait_for(lambda: not machine.pids(DAEMONS), "the daemons' end", 10)
    again = machine.up().wait_until_ready()
    assert set(workers) <= set(machine.pids("^/usr/bin/bwrap"))
    assert machine.status(HELLO) == "200"
    machine.signal(signal.SIGKILL, SUPERVISOR)
    again.ended(20)
    assert ROOM in machine.read("/proc/self/mounts")
    assert machine.up("--remove").ended() == 0
    assert machine.pids("^/usr/bin/bwrap") == []
    assert ROOM not in machine.read("/proc/self/mounts")
    assert not machine.has("/run/blockyard")


def test_a_daemon_without_supervisor_keeps_its_code_until_it_is_ended(machine, up):
    up.interrupt()
    spawner = ["/opt/blockyard/venv/bin/python", "/opt/blockyard/venv/bin/blockyard-spawner"]
    stray = machine.start(*spawner, "--socket", "/run/stray.sock", stderr=subprocess.DEVNULL)
    wait_for(lambda: machine.has("/run/stray.sock"), "its socket")
    (pid,) = machine.pids(DAEMONS)
    for arguments in ([], ["--remove"]):
        refused = machine.up(*arguments)
        assert refused.ended() == 1
        assert f"kill {pid}" in refused.printed()
    assert machine.has("/opt/blockyard/venv/bin/blockyard-spawner")
    machine.run("kill", pid)
    stray.wait(20)
    assert machine.up("--remove").ended() == 0


def test_metadata_at_its_ipv6_address_keeps_apps_from_the_network(machine):
    machine.run("ip", "address", "add", "fd00:ec2::254/128", "dev", "lo", "nodad")
    with machine.stranger("[fd00:ec2::254]:80"):
        machine.up().wait_until_ready()
    assert re.search(r'^network = "none"$', machine.read(CONFIG), re.MULTILINE)


def test_a_mistyped_option_is_an_error_of_use_and_does_nothing():
    for arguments in (["--bogus"], ["--remove", "now"]):
        done = subprocess.run([UP, *arguments], check=False, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2
        assert "scripts/up --help" in done.stderr
