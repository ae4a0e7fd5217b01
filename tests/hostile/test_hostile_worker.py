"""A hostile app tries to get out of its box, through the front door; then the same with layers switched off."""

import os
import re
import signal
import socket
import subprocess
from pathlib import Path

import pytest
from attacks import ATTACKS, CALLS, FILTER, PRIVILEGED_CALLS, PROCESSES, TERMINAL_STEPS
from target import CANARY, deploy_shell, processes_of

pytest_plugins = ["hostile_apps"]
DECOY = 2**20 + 7  # a uid that nobody else has


@pytest.fixture(scope="module")
def place(target, neighbour, shell, program, tmp_path_factory):
    """What an attack's names stand for: the host and the neighbour, each with something to take."""
    bundle, other = neighbour
    own = target.worker("hostile")
    assert (target.cgroup / "workers" / own.id / "cgroup.procs").read_text()  # it is there, to be widened
    library = target.state / "libraries" / "theirs"
    library.mkdir(mode=0o755)
    (library / "secret").write_text(CANARY)
    directory = Path("/run/hostile-service")
    directory.mkdir(exist_ok=True)
    (directory / "service.sock").unlink(missing_ok=True)
    as_decoy = ["setpriv", f"--reuid={DECOY}", "--regid=65534", "--clear-groups"]
    tried = Path("/tmp/hostile-attack")
    tried.write_bytes(program.read_bytes())
    tried.chmod(0o755)
    for plant in ("plant_shm", "plant_queue"):
        assert subprocess.check_output([*as_decoy, tried, plant], text=True) == "ok\n"
    with (
        socket.socket(socket.AF_UNIX) as service,
        socket.socket(socket.AF_UNIX) as abstract,
        socket.create_server(("127.0.0.1", 0)) as listener,
    ):
        service.bind(str(directory / "service.sock"))
        (directory / "service.sock").chmod(0o666)
        abstract.bind("\0hostile-host-service")
        for sock in (service, abstract):
            sock.listen(64)
        yield {
            "canary": CANARY, "state": target.state, "config": target.config, "runtime": target.runtime,
            "cgroup": target.cgroup, "id": other.id, "pid": other.pid, "uid": other.uid,
            "own_id": own.id, "own_uid": own.uid,
            "socket": target.runtime / other.id / "app.sock", "bundle": target.state / "bundles" / bundle,
            "own_bundle": target.state / "bundles" / shell.bundle,
            "spawner_socket": target.spawner_socket, "spawner_directory": target.spawner_socket.parent,
            "service": directory / "service.sock", "service_directory": directory,
            "abstract": "hostile-host-service", "port": listener.getsockname()[1],
            "api_port": target.server.control_url.rpartition(":")[2], "decoy_uid": DECOY,
            "too_much": target.tmp_size + (1 << 20),
        }  # fmt: skip
    subprocess.run([*as_decoy, tried, "drop_queue"], check=True)
    subprocess.run([*as_decoy, "ipcrm", "--shmem-key", "0x626c6f63"], check=True)
    tried.unlink()
    (directory / "service.sock").unlink()
    directory.rmdir()


@pytest.fixture
def decoy():
    """A process of the host with the uid that some steps run as."""
    process = subprocess.Popen(["setpriv", f"--reuid={DECOY}", "--regid=65534", "--clear-groups", "sleep", "600"])
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def given(target):
    """A cgroup whose files belong to the uid that some steps run as, as no worker's do."""
    directory = target.cgroup.parent / "hostile-given"
    directory.mkdir()
    for path in (directory, *directory.iterdir()):
        os.chown(path, DECOY, -1)
    yield directory
    directory.rmdir()


def filled(value, names):
    if isinstance(value, str):
        return value.format(**names)
    return [filled(each, names) for each in value] if isinstance(value, list) else value


def seen(pattern, text):
    return re.search(pattern, text, re.MULTILINE)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_what_a_worker_tries_is_stopped(shell, place, neighbour_lives_on, attack):
    said = shell.run(filled(attack.command, place))
    assert seen(filled(attack.stopped, place), said), said
    assert not seen(filled(attack.succeeded, place), said), said


STEPS = [(attack, step) for attack in ATTACKS for step in attack.steps]


@pytest.mark.parametrize(
    ("attack", "step"), STEPS, ids=[f"{a.name}, {a.steps.index(s) + 1} off: {s.then or 'succeeds'}" for a, s in STEPS]
)
def test_without_its_layer_it_succeeds_or_the_next_layer_stops_it(
    shell, place, decoy, given, neighbour_lives_on, attack, step
):
    names = {**place, "decoy": decoy.pid, "given": given}
    said = shell.weakened(
        filled(step.command or attack.command, names), **{key: filled(value, names) for key, value in step.how.items()}
    )
    assert seen(filled(step.seen, names), said), said
    assert step.then == "" or not seen(filled(attack.succeeded, names), said), said


# --- system calls ----------------------------------------------------------------------------------------------------

EACH_CALL = "; ".join(f"echo {call.name} $(/tmp/attack {call.name})" for call in (*CALLS, *PRIVILEGED_CALLS))
MARK = "EXFULL"  # an error that none of these calls has of itself


def told(said):
    return dict(line.split() for line in said.splitlines())


@pytest.fixture(scope="session")
def answers(shell):
    return told(shell.run(EACH_CALL))


@pytest.fixture(scope="session")
def unfiltered_answers(shell):
    return told(shell.weakened(EACH_CALL, off=[FILTER]))


@pytest.fixture(scope="session")
def marked_answers(shell):
    return told(shell.weakened(EACH_CALL, flags=[f"--refused-with={MARK}"]))


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
def test_a_system_call_that_no_app_needs_is_refused(answers, call):
    assert answers[call.name] == ("ENOSYS" if call.name == "clone3_user" else "EPERM")


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
def test_a_filter_with_an_error_of_its_own_would_be_seen_to_refuse_each_call_that_no_app_needs(marked_answers, call):
    """The kernel's own refusal is often the same EPERM."""
    assert marked_answers[call.name] == ("ENOSYS" if call.name == "clone3_user" else MARK)


@pytest.mark.parametrize("call", CALLS, ids=lambda call: f"{call.name} without the filter: {call.then or 'succeeds'}")
def test_without_the_filter_a_call_succeeds_or_the_next_layer_stops_it(unfiltered_answers, call):
    assert re.fullmatch(call.seen, unfiltered_answers[call.name])


@pytest.mark.parametrize("call", PRIVILEGED_CALLS, ids=lambda call: f"{call.name}: {call.layer}")
def test_a_system_call_that_apps_need_is_refused_for_want_of_privilege_where_it_would_take_some(answers, call):
    assert answers[call.name] == call.seen


@pytest.mark.parametrize("call", PRIVILEGED_CALLS, ids=lambda call: call.name)
def test_a_filter_with_an_error_of_its_own_would_not_be_seen_where_privilege_is_what_is_missing(
    marked_answers, unfiltered_answers, call
):
    assert marked_answers[call.name] == unfiltered_answers[call.name] == call.seen


def test_enough_calls_succeed_without_the_filter_to_prove_it(unfiltered_answers):
    assert [name for name, said in unfiltered_answers.items() if said == "ok"] != []
    assert {"keyctl", "add_key", "ptrace_child"} <= {name for name, said in unfiltered_answers.items() if said == "ok"}


@pytest.mark.parametrize(("off", "then", "expected"), TERMINAL_STEPS, ids=[then for _, then, _ in TERMINAL_STEPS])
def test_typing_into_a_terminal_has_a_layer_behind_each_layer(shell, off, then, expected):
    assert re.search(rf"({expected})$", shell.weakened("/tmp/attack TIOCSTI", off=off))


# --- signals to everybody --------------------------------------------------------------------------------------------


def test_a_signal_to_everybody_reaches_the_sender_alone(target, program, neighbour_lives_on):
    killer = deploy_shell(target, "killer", program)
    killer.run("true")
    worker, before = target.worker("killer"), target.spawner()
    answer = killer.visitor.http.get("/app/killer/", params={"sh": "/tmp/attack kill_all"})
    assert answer.status_code == 502
    target.end("killer")
    assert processes_of(worker.uid) == []
    assert target.spawner() == before


def test_without_a_process_namespace_a_signal_reaches_whoever_has_the_same_uid(shell, decoy):
    shell.weakened("/tmp/attack kill_all", off=[PROCESSES])
    assert decoy.poll() is None  # the uid is the next layer
    shell.weakened("/tmp/attack kill_all", off=[PROCESSES], uid=DECOY)
    assert decoy.wait(10) == -signal.SIGKILL
