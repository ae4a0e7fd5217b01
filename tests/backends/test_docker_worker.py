"""What only a Docker worker has: its container, its network, its runtime, and what becomes of it with the engine."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from keeping_manager import KeepingManager
from running_spawner import EXAMPLES, PROLOGUE, Refusal, api_user, eventually

WAITING = "Sys.sleep(600)"
CONNECT = 'tell(class(try(socketConnection("{host}", {port}, timeout = 3), silent = TRUE))[1])'


def told(helper, client, worker, code, **fields):
    running = helper.run_r(client, worker, PROLOGUE + code + "\nquit()", **fields)
    helper.result(client, worker)
    return [line.removeprefix("TOLD ") for line in running.output().splitlines() if line.startswith("TOLD ")]


def started(docker, **keys):
    docker.configure(docker=keys)
    docker.start()
    return docker.client()


# --- its container -------------------------------------------------------------------------------------------------


def test_the_engine_confines_it_as_it_was_told(docker):
    client = started(docker)
    docker.run_r(client, "worker0001", WAITING, limits={"memory": 256 << 20, "cpu": 500, "pids": 64, "tmp": 8 << 20})
    found = docker.container_of("worker0001")
    host, config = found["HostConfig"], found["Config"]
    assert host["Privileged"] is False
    assert host["ReadonlyRootfs"] is True
    assert (host["CapAdd"], host["CapDrop"]) == (None, ["ALL"])
    assert host["SecurityOpt"] == ["no-new-privileges"]
    assert (host["PidMode"], host["UTSMode"], host["UsernsMode"], host["IpcMode"]) == ("", "", "", "private")
    assert (host["Memory"], host["MemorySwap"]) == (256 << 20, 256 << 20)
    assert (host["NanoCpus"], host["PidsLimit"]) == (500_000_000, 64)
    assert host["Tmpfs"] == {"/tmp": f"rw,exec,nosuid,nodev,mode=1777,size={8 << 20}"}
    assert not host["Devices"]
    assert host["LogConfig"]["Config"] == {"max-size": "5m", "max-file": "2"}
    assert host["RestartPolicy"]["Name"] == "no"
    assert host["Init"] is True
    assert config["User"] == "65534:65534"
    assert config["Image"] == "blockyard-worker:latest"
    writable = [mount["Destination"] for mount in found["Mounts"] if mount["RW"]]
    assert writable == ["/run/worker"]
    assert {mount["Destination"] for mount in found["Mounts"]} == {"/app", "/run/worker", "/run/blockyard"}
    labels = {name: value for name, value in config["Labels"].items() if name.startswith("dev.blockyard/")}
    assert labels == {
        "dev.blockyard/installation": str(docker.state_dir),
        "dev.blockyard/worker": "worker0001",
        "dev.blockyard/app": "an-app",
    }


def test_the_engines_own_system_call_filter_is_on(docker):
    client = started(docker)
    code = (
        'for (line in grep("^Seccomp:", readLines("/proc/self/status"), value = TRUE)) tell(gsub("\\\\s+", " ", line))'
    )
    assert told(docker, client, "worker0001", code) == ["Seccomp: 2"]


def test_its_limits_are_enforced_and_going_over_memory_is_told_as_such(docker):
    client = started(docker)
    code = 'system("sleep 600 &"); x <- list(); repeat x[[length(x) + 1]] <- rnorm(1e6)'
    docker.run_r(client, "worker0001", code, limits={"memory": 200 << 20})
    result = docker.result(client, "worker0001")
    assert result["reason"] == "oom"
    assert result["oom_kills"] >= 1
    assert not docker.leftovers()


def test_it_ends_as_a_whole_when_one_of_its_processes_runs_out_of_memory(docker):
    client = started(docker)
    code = 'message("up"); system("tail /dev/zero"); repeat Sys.sleep(1)'
    docker.run_r(client, "worker0001", code, limits={"memory": 200 << 20})
    assert docker.result(client, "worker0001")["reason"] == "oom"


def test_it_cannot_have_more_processes_than_it_may(docker):
    client = started(docker)
    code = 'tell(system("for i in $(seq 100); do sleep 5 & done 2>/dev/null; true", intern = FALSE)); tell("ended")'
    worker = docker.run_r(client, "worker0001", PROLOGUE + code + ";Sys.sleep(600)", limits={"pids": 32})
    worker.wait_for_output("TOLD")
    assert int(docker.engine.run("top", "blockyard-worker0001").stdout.count("\n")) <= 33


def test_a_mount_that_was_swapped_after_the_check_runs_nothing(docker):
    outside = docker.root / "outside"
    outside.mkdir()
    (outside / "app.R").write_text(PROLOGUE + 'tell("outside"); quit()')
    (outside / ".Renviron").write_text("R_PROFILE_USER=/app/.profile\n")
    (outside / ".profile").write_text('cat("TOLD profile\\n")')
    outside.chmod(0o755)
    client = started(docker)
    bundles = docker.state_dir / "bundles"
    name = docker.bundle("swapped", {"app.R": PROLOGUE + 'tell("inside"); quit()'})
    (bundles / "link").symlink_to(outside)
    exchange = f"renameat2(-100, b'{bundles}/{name}', -100, b'{bundles}/link', 2)"
    swaps = f"import ctypes,time\nlibc = ctypes.CDLL(None)\nwhile True: libc.{exchange}; time.sleep(0.05)"
    racer = subprocess.Popen(["python3", "-c", swaps])
    heard, statuses = [], []
    try:
        for number in range(40):
            if 117 in statuses:
                break
            try:
                worker = docker.spawn(client, f"worker{number:04}", name)
            except Refusal:
                continue
            statuses.append(docker.result(client, worker.id)["status"])
            heard.append(worker.output())
    finally:
        racer.kill()
        racer.wait()
    assert 117 in statuses, statuses  # the engine did mount the other one, and nothing of it was run
    assert not [text for text in heard if "TOLD outside" in text or "TOLD profile" in text]
    assert "source_swapped" in [entry["BLOCKYARD_RESULT"] for entry in docker.audit() if "BLOCKYARD_RESULT" in entry]


def test_the_helper_is_nobody_and_the_api_has_no_way_to_the_engine(docker):
    started(docker)
    status = Path(f"/proc/{docker.process.pid}/status").read_text()
    assert [line.split()[1] for line in status.splitlines() if re.match("Cap(Inh|Prm|Eff|Bnd|Amb)", line)] == [
        "0" * 16
    ] * 5
    assert "NoNewPrivs:\t1" in status
    user = api_user()
    asking = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--init-groups"]
    denied = subprocess.run(
        [*asking, "docker", "--host", f"unix://{docker.engine.socket}", "ps"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert denied.returncode
    assert "permission denied" in denied.stderr


def test_the_runtime_is_chosen_by_who_may_visit_and_by_nobody_else(docker):
    client = started(docker, runtime="runc", runtime_defaults={"public": "crun"})
    for worker, access in (("worker0001", "public"), ("worker0002", "acl"), ("worker0003", None)):
        docker.run_r(client, worker, WAITING, access=access)
    runtimes = [docker.container_of(f"worker{number:04}")["HostConfig"]["Runtime"] for number in (1, 2, 3)]
    assert runtimes == ["crun", "runc", "runc"]


def test_an_app_is_served_under_the_other_runtime(docker):
    client = started(docker, runtime="crun")
    worker = docker.spawn(client, "worker0001", docker.bundle("hello", EXAMPLES / "hello"))
    assert worker.get().startswith("HTTP/1.1 200 OK")
    assert client.call("stop", id="worker0001", grace=0)["result"]["reason"] == "stopped"


def test_a_runtime_that_the_engine_does_not_have_stops_the_start_and_names_those_it_has(docker):
    docker.configure(docker={"runtime_defaults": {"public": "kata-runtime"}})
    with pytest.raises(AssertionError) as stopped:
        docker.start()
    assert docker.process.returncode == 2
    words = "'docker.runtime_defaults.public' is kata-runtime, which the engine does not have; it has crun, "
    assert words in str(stopped.value)


# --- its network ---------------------------------------------------------------------------------------------------


def listening(docker, client, worker, **fields):
    """Start a worker that listens on TCP as well, and return its address."""
    code = """
      repeat { s <- serverSocket(7000); tell("up"); c <- socketAccept(s, timeout = 600); close(c); close(s) }"""
    running = docker.run_r(client, worker, PROLOGUE + code, **fields)
    running.wait_for_output("up")
    (network,) = docker.container_of(worker)["NetworkSettings"]["Networks"].values()
    return network["IPAddress"]


def test_each_has_a_network_of_its_own_from_the_pool_and_reaches_no_other(docker):
    client = started(docker, network_pool="10.213.32.0/24")
    address = listening(docker, client, "worker0001")
    assert address.startswith("10.213.32.")
    (network,) = json.loads(docker.engine.run("network", "inspect", "blockyard-worker0001").stdout)
    assert network["IPAM"]["Config"][0]["Subnet"] == "10.213.32.0/28"
    assert network["EnableIPv6"] is False
    assert network["Options"]["com.docker.network.bridge.enable_icc"] == "false"
    assert told(docker, client, "worker0002", CONNECT.format(host=address, port=7000)) == ["try-error"]
    assert told(docker, client, "worker0003", CONNECT.format(host=address, port=7000), network="none") == ["try-error"]
    # that nobody answers is not because nobody listens
    own = subprocess.run(
        ["nsenter", f"--net={docker.engine.root}/net", "bash", "-c", f"echo > /dev/tcp/{address}/7000"],
        check=False, capture_output=True, timeout=20,
    )  # fmt: skip
    assert own.returncode == 0


def test_a_pool_that_is_used_up_is_told_and_a_subnet_is_used_again(docker):
    client = started(docker, network_pool="10.213.40.0/28")
    docker.run_r(client, "worker0001", WAITING)
    with pytest.raises(Refusal) as refusal:
        docker.run_r(client, "worker0002", WAITING)
    assert refusal.value.code == "network_pool_exhausted"
    assert "docker.network_pool" in refusal.value.message
    docker.run_r(client, "worker0003", WAITING, network="none")  # needs none
    client.call("stop", id="worker0001", grace=0)
    docker.run_r(client, "worker0004", WAITING)


def test_a_subnet_that_another_network_has_is_passed_over(docker):
    docker.engine.run("network", "create", "--subnet", "10.213.48.0/28", "somebody-elses")
    try:
        client = started(docker, network_pool="10.213.48.0/27")
        docker.engine.run("network", "create", "--subnet", "10.213.48.16/29", "later")
        try:
            with pytest.raises(Refusal):
                docker.run_r(client, "worker0001", WAITING)
        finally:
            docker.engine.run("network", "rm", "later")
        docker.run_r(client, "worker0002", WAITING)
        (network,) = docker.container_of("worker0002")["NetworkSettings"]["Networks"].values()
        assert network["IPAddress"].startswith("10.213.48.1")
    finally:
        docker.engine.run("network", "rm", "somebody-elses", check=False)


def test_sidecars_are_reached_under_their_names_and_workers_still_do_not_reach_each_other(docker):
    engine = docker.engine
    engine.run("network", "create", "--subnet", "10.213.60.0/24", "services")
    try:
        serve = "import socket as s; l = s.create_server(('', 7001)); [l.accept() for _ in iter(int, 1)]"
        engine.run(
            "run",
            "--detach",
            "--name",
            "warehouse",
            "--network",
            "services",
            "blockyard-worker",
            "python3",
            "-c",
            serve,
        )
        client = started(docker, service_network="services", network_pool="10.213.56.0/24")
        assert told(docker, client, "worker0001", CONNECT.format(host="warehouse", port=7001)) == ["sockconn"]
        address = listening(docker, client, "worker0002")
        assert told(docker, client, "worker0003", CONNECT.format(host=address, port=7000)) == ["try-error"]
        client.call("stop", id="worker0002", grace=0)
        assert not docker.leftovers()
        assert list(engine.show("warehouse")["NetworkSettings"]["Networks"]) == ["services"]
    finally:
        engine.run("rm", "--force", "warehouse", check=False)
        engine.run("network", "rm", "services", check=False)


def test_a_service_network_that_is_not_there_is_told(docker):
    client = started(docker, service_network="missing")
    with pytest.raises(Refusal, match="no_service_network"):
        docker.run_r(client, "worker0001", WAITING)
    eventually(lambda: not docker.leftovers(), "nothing is left")


def test_the_hosts_network_is_refused(docker):
    with pytest.raises(Refusal, match="network_not_available"):
        docker.run_r(started(docker), "worker0001", WAITING, network="host")


# --- what others left, and what fails ------------------------------------------------------------------------------


def test_what_was_half_made_is_removed_at_the_next_start_and_nothing_else(docker):
    client = started(docker, network_pool="10.213.64.0/24")
    docker.run_r(client, "worker0001", WAITING)
    docker.end(9)
    engine, ours = docker.engine, f"dev.blockyard/installation={docker.state_dir}"
    mine = ["--label", ours, "--label", "dev.blockyard/app=demo"]
    engine.run(
        "create",
        "--name",
        "blockyard-half00001",
        *mine,
        "--label",
        "dev.blockyard/worker=half00001",
        "blockyard-worker",
        "true",
    )
    engine.run("network", "create", "--label", ours, "--label", "dev.blockyard/worker=half00002", "blockyard-half00002")
    (docker.runtime_dir / "half00003").mkdir()
    os.chown(docker.runtime_dir / "half00003", docker.runtime_dir.stat().st_uid, -1)
    others = ["--label", "dev.blockyard/installation=/srv/another", "--label", "dev.blockyard/worker=other00001"]
    engine.run("create", "--name", "blockyard-other00001", *others, "blockyard-worker", "true")
    engine.run("create", "--name", "blockyard-database", "blockyard-worker", "true")
    engine.run("network", "create", *others, "blockyard-other00001")
    try:
        docker.start()
        left = {
            "containers": ["blockyard-worker0001"],
            "networks": ["blockyard-worker0001"],
            "directories": ["worker0001"],
        }
        eventually(lambda: docker.leftovers() == left, "what was half-made is gone", docker.audit_text)
        assert engine.containers("name=blockyard-other00001", "name=blockyard-database")
        assert engine.networks("name=blockyard-other00001")
        assert [record["id"] for record in docker.client().call("list")["workers"]] == ["worker0001"]
    finally:
        engine.run("rm", "--force", "blockyard-other00001", "blockyard-database")
        engine.run("network", "rm", "blockyard-other00001")


@pytest.mark.parametrize("delay", [0.02, 0.2, 0.5])
def test_a_helper_that_is_killed_in_the_middle_of_a_start_leaves_no_more_than_a_worker(docker, delay):
    client = started(docker)
    reading, writing = os.pipe2(os.O_CLOEXEC)
    bundle = docker.bundle("waiting", {"app.R": WAITING})
    client.send("spawn", (writing,), id="worker0001", kind="app", app="demo", bundle=bundle)
    os.close(writing)
    time.sleep(delay)
    docker.end(9)
    docker.start()
    client = docker.client()

    def settled():
        known = [record["id"] for record in client.call("list")["workers"] if record["state"] == "running"]
        if known:
            client.call("stop", id="worker0001", grace=0)
        return not docker.leftovers()

    eventually(settled, "nothing is left")
    os.close(reading)


def test_an_engine_that_restarts_takes_its_containers_along_and_serves_again(engine, docker):
    client = started(docker)
    worker = docker.run_r(client, "worker0001", "message('up'); " + WAITING)
    worker.wait_for_output("up")
    engine.end()
    with pytest.raises(Refusal, match="docker_unreachable"):
        docker.run_r(client, "worker0002", WAITING)
    assert client.call("list", id="worker0001")["workers"][0]["result"] is None  # how it ended, only the engine knows
    engine.start()
    assert docker.result(client, "worker0001")["reason"] in ("exited", "signalled")
    eventually(lambda: not docker.leftovers(), "nothing is left", docker.audit_text)
    served = docker.spawn(client, "worker0003", docker.bundle("hello", EXAMPLES / "hello"))
    assert served.get().startswith("HTTP/1.1 200 OK")


def test_an_engine_that_does_not_answer_is_given_up_in_time_and_what_it_made_is_removed(engine, docker):
    client = started(docker)
    os.kill(engine.process.pid, signal.SIGSTOP)
    try:
        with pytest.raises(Refusal, match="docker_slow"):
            docker.run_r(client, "worker0001", WAITING)
        assert client.call("list")["workers"] == []  # others are answered meanwhile
    finally:
        os.kill(engine.process.pid, signal.SIGCONT)
    eventually(lambda: not docker.leftovers(), "nothing is left", docker.audit_text)
    docker.run_r(client, "worker0002", WAITING)


def test_an_image_that_is_not_there_is_told_with_what_makes_it(docker):
    client = started(docker, image="no-such-image:latest")
    with pytest.raises(Refusal) as refusal:
        docker.run_r(client, "worker0001", WAITING)
    assert refusal.value.code == "no_image"
    assert refusal.value.message.startswith("Make no-such-image:latest with scripts/build-worker-image")
    eventually(lambda: not docker.leftovers(), "nothing is left")


def test_a_socket_that_may_not_be_used_is_told_with_what_to_do(docker):
    docker.groups = ()
    client = started(docker)
    with pytest.raises(Refusal) as refusal:
        docker.run_r(client, "worker0001", WAITING)
    assert refusal.value.code == "docker_denied"
    assert str(docker.engine.socket) in refusal.value.message
    with pytest.raises(Refusal, match="docker_denied"):  # "none" would be a lie
        client.call("list")


def test_an_engine_that_is_away_is_told_and_found_again(docker):
    socket_path = docker.root / "control" / "engine.sock"
    client = started(docker, socket=str(socket_path))
    with pytest.raises(Refusal, match="docker_unreachable"):
        docker.run_r(client, "worker0001", WAITING)
    socket_path.symlink_to(docker.engine.socket)
    eventually(lambda: "workers" in _tried(client, "list"), "the engine is found")
    docker.run_r(client, "worker0002", WAITING)


def _tried(client, operation):
    try:
        return client.call(operation)
    except Refusal:
        return {}


def test_a_flood_of_its_log_is_dropped_with_a_line_that_says_how_much_and_holds_up_no_other(docker):
    client = started(docker)
    chatty = docker.run_r(client, "chatty0001", "system(\"yes $(printf '%01000d' 0)\")")
    chatty.wait_for_output("bytes were dropped")
    worker = docker.spawn(client, "worker0001", docker.bundle("hello", EXAMPLES / "hello"))
    assert worker.get().startswith("HTTP/1.1 200 OK")
    for name in ("worker0001", "chatty0001"):
        assert client.call("stop", id=name, grace=0)["result"]["reason"] == "stopped"
    told = re.findall(r"^\[blockyard [0-9TZ:-]+\] at least (\d+) bytes were dropped", chatty.output(), re.MULTILINE)
    assert all(int(number) >= 1000 for number in told)


def test_the_log_goes_on_after_a_restart_of_the_helper_without_a_lost_or_a_doubled_line(docker):
    # The test stands for systemd, which keeps the pipe.
    manager = KeepingManager(docker)
    client = started(docker)
    code = 'i <- 0; repeat { i <- i + 1; cat("line", i, "\\n"); Sys.sleep(0.01); if (i == 600) quit() }'
    worker = docker.run_r(client, "worker0001", code)
    worker.wait_for_output("line 50 ")
    docker.end(9)
    docker.start()
    docker.result(docker.client(), "worker0001")
    manager.close()
    lines = [int(line.split()[1]) for line in worker.output().splitlines() if line.startswith("line")]
    assert lines == sorted(set(lines)), "doubled"
    assert lines == list(range(1, 601))
