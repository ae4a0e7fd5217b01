"""What a worker is, whichever helper starts it: the same statements against both."""

import json
import os
import pwd
import select
import socket
import struct

import pytest
from running_spawner import EXAMPLES, PROLOGUE, Refusal, acting_as, api_user, eventually, told

WAITING = "Sys.sleep(600)"
STUBBORN = "repeat tryCatch({message('up'); Sys.sleep(600)}, interrupt = \\(e) 0)"


# --- it serves ---------------------------------------------------------------------------------------------------


def test_it_serves_its_app_on_its_socket_and_ends_with_nothing_left(helper, client):
    worker = helper.spawn(client, "worker0001", helper.bundle("hello", EXAMPLES / "hello"))
    assert worker.get().startswith("HTTP/1.1 200 OK")
    assert helper.leftovers()
    assert client.call("stop", id="worker0001", grace=5000)["result"]["reason"] == "stopped"
    assert not helper.leftovers()


def test_the_api_reaches_it_under_the_uid_that_was_told_and_a_stranger_does_not(helper, client):
    worker = helper.spawn(client, "worker0001", helper.bundle("hello", EXAMPLES / "hello"))
    user = api_user()
    worker.connect().close()
    with acting_as(user.pw_uid, user.pw_gid), worker.connect() as connection:
        _, uid, gid = struct.unpack("iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    assert (uid, gid) == (worker.uid, 65534)
    with acting_as(65533, 65533), socket.socket(socket.AF_UNIX) as stranger, pytest.raises(PermissionError):
        stranger.connect(str(worker.socket))


def test_without_a_network_it_is_served_all_the_same(helper, client):
    worker = helper.spawn(client, "worker0001", helper.bundle("hello", EXAMPLES / "hello"), network="none")
    assert worker.get().startswith("HTTP/1.1 200 OK")
    alone = helper.run_r(
        client, "worker0002", PROLOGUE + "tell(length(readLines('/proc/net/dev'))); quit()", network="none"
    )
    helper.result(client, "worker0002")
    assert "TOLD 3\n" in alone.output()  # two lines of headings, and the loopback


# --- how it ends -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("quit(status = 7)", {"reason": "exited", "status": 7, "signal": None}),
        ("tools::pskill(Sys.getpid(), 11)", {"reason": "signalled", "status": 139, "signal": 11}),
        ("stop('broken')", {"reason": "exited", "status": 1, "signal": None}),
    ],
    ids=["exit", "signal", "error"],
)
def test_how_an_app_ended_is_told_and_audited(helper, client, code, expected):
    helper.run_r(client, "worker0001", code)
    result = helper.result(client, "worker0001")
    assert {name: result[name] for name in expected} == expected
    assert result["oom_kills"] == 0
    entries = [entry for entry in helper.audit() if entry.get("BLOCKYARD_WORKER") == "worker0001"]
    assert [entry["BLOCKYARD_RESULT"] for entry in entries] == ["ok", expected["reason"]]
    assert not helper.leftovers()


def test_a_stop_lets_the_app_say_goodbye(helper, client):
    goodbye = 'onStop(function() message("goodbye")); shinyApp(fluidPage(), \\(i, o) {})'
    worker = helper.run_r(client, "worker0001", goodbye)
    worker.get()
    assert client.call("stop", id="worker0001", grace=30_000)["result"]["reason"] == "stopped"
    assert "goodbye" in worker.output()


def test_a_stop_kills_what_ignores_the_interrupt_and_all_that_it_forked(helper, client):
    forks = "system(\"for i in 1 2 3; do setsid sh -c '(sleep 601 &) ; sleep 601' & done\");"
    worker = helper.run_r(client, "worker0001", forks + STUBBORN)
    worker.wait_for_output("up")
    stopped = client.call("stop", id="worker0001", grace=100)["result"]
    assert (stopped["reason"], stopped["signal"]) == ("stopped", 9)
    assert not helper.leftovers()
    assert not os.popen("pgrep -f '^sleep 601$'").read()


def test_what_an_app_left_running_ends_with_it(helper, client):
    worker = helper.run_r(client, "worker0001", "system('setsid sleep 602 &'); message('left'); quit(status = 0)")
    worker.wait_for_output("left")
    assert helper.result(client, "worker0001")["status"] == 0
    assert not os.popen("pgrep -f '^sleep 602$'").read()


def test_the_descriptor_of_its_process_becomes_readable_when_it_ends(helper, client):
    worker = helper.run_r(client, "worker0001", WAITING)
    assert not select.select([worker.pidfd], [], [], 0)[0]
    client.call("stop", id="worker0001", grace=0)
    assert select.select([worker.pidfd], [], [], 30)[0]


def test_two_stops_wait_for_the_same_end_and_a_late_one_is_told_it(helper, client):
    helper.run_r(client, "worker0001", WAITING)
    numbers = {client.send("stop", id="worker0001", grace=0), client.send("stop", id="worker0001", grace=0)}
    replies = [client.receive()[0] for _ in numbers]
    assert {message["seq"] for message in replies} == numbers
    late = client.call("stop", id="worker0001")
    assert late["result"] == replies[0]["ok"]["result"] == replies[1]["ok"]["result"]


def test_other_requests_are_answered_while_a_stop_takes_its_time(helper, client):
    worker = helper.run_r(client, "worker0001", STUBBORN)
    worker.wait_for_output("up")
    stop = client.send("stop", id="worker0001", grace=2000)
    listed = client.send("list")
    first, second = client.receive()[0], client.receive()[0]
    assert (first["seq"], second["seq"]) == (listed, stop)
    assert first["ok"]["workers"][0]["state"] == "stopping"


def test_a_stop_goes_on_when_its_client_has_gone(helper, client):
    helper.run_r(client, "worker0001", WAITING)
    client.send("stop", id="worker0001", grace=0)
    client.close()
    assert helper.result(helper.client(), "worker0001")["reason"] == "stopped"


def test_a_directory_that_resists_is_removed_as_well(helper, client):
    hostile = """
      dir.create('/run/worker/a/b', recursive = TRUE); file.create('/run/worker/a/b/c'); file.create('/run/worker/-rf')
      dir.create('/run/worker/.d/e', recursive = TRUE); Sys.chmod('/run/worker/.d', '0000')
      file.symlink('/usr', '/run/worker/link'); Sys.chmod(c('/run/worker/a/b', '/run/worker/a', '/run/worker'), '0000')
      quit(status = 3)"""
    helper.run_r(client, "worker0001", hostile)
    assert helper.result(client, "worker0001")["status"] == 3
    assert not helper.leftovers()


# --- what the helper says ------------------------------------------------------------------------------------------


def test_it_is_listed_with_what_the_api_has_to_know(helper, client):
    worker = helper.run_r(client, "worker0001", WAITING, app="demo")
    found = client.call("list", id="worker0001")
    (record,) = found["workers"]
    os.close(found["descriptor"])
    assert set(record) == {"id", "uid", "pid", "cgroup", "app", "state", "result"}
    assert (record["id"], record["app"], record["state"], record["result"]) == ("worker0001", "demo", "running", None)
    assert (record["uid"], record["pid"]) == (worker.uid, worker.pid)
    assert client.call("list")["workers"] == [record]


def test_its_start_and_its_end_are_audited_with_who_asked(helper, client):
    worker = helper.run_r(client, "worker0001", WAITING, app="demo")
    client.call("stop", id="worker0001", grace=0)
    entries = [entry for entry in helper.audit() if entry.get("BLOCKYARD_WORKER") == "worker0001"]
    spawn, stop, exit_ = entries
    for entry in entries:
        assert (entry["BLOCKYARD_APP"], entry["BLOCKYARD_UID"]) == ("demo", str(worker.uid))
        assert entry["BLOCKYARD_CGROUP"] == worker.cgroup
    for entry in (spawn, stop):
        assert entry["BLOCKYARD_PEER_UID"] == str(api_user().pw_uid)
        assert int(entry["BLOCKYARD_PEER_PID"]) == os.getpid()
    assert len({entry["MESSAGE_ID"] for entry in entries}) == 3
    assert exit_["BLOCKYARD_RESULT"] == "stopped"


def test_hello_tells_the_version_and_the_room_there_is(helper, client):
    found = helper.client(greet=False).hello()
    assert set(found) == {"version", "controllers", "unprivileged", "uids_free", "uids_total"}
    assert found["uids_free"] == found["uids_total"] > 0
    helper.run_r(client, "worker0001", WAITING)
    assert helper.client(greet=False).hello()["uids_free"] == found["uids_free"] - 1


# --- what it is given ----------------------------------------------------------------------------------------------


def test_the_environment_holds_the_documented_names_alone(helper, client):
    # R's front end adds its own; what the worker was given is what bwrap's init process has.
    code = "for (name in system(\"tr '\\\\0' '\\\\n' < /proc/1/environ\", intern = TRUE)) tell(name)"
    lines = dict(line.split("=", 1) for line in told(helper, client, code, app="demo", env={"APP_COLOUR": "blå"}))
    assert lines == {
        "APP_COLOUR": "blå",
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "HOME": "/tmp",
        "TMPDIR": "/tmp",
        "R_NSIZE": "1000000",
        "R_VSIZE": "32M",
        "BLOCKYARD_SOCKET": "/run/worker/app.sock",
        "BLOCKYARD_APP": "demo",
        "BLOCKYARD_WORKER": "worker0000",
    }


def test_root_may_add_to_the_environment_and_the_api_may_not_change_that(stopped_helper):
    stopped_helper.configure('[server.worker_env]\nTZ = "Europe/Oslo"\nAPP_MODE = "root"\n')
    stopped_helper.start()
    code = 'tell(Sys.getenv("TZ")); tell(Sys.getenv("APP_MODE"))'
    lines = told(stopped_helper, stopped_helper.client(), code, env={"APP_MODE": "api"})
    assert lines == ["Europe/Oslo", "root"]


def test_no_descriptor_but_the_standard_ones_reaches_the_app(helper, client):
    told(helper, client, 'tell("another worker came before")')
    code = 'for (number in list.files("/proc/self/fd")) tell(Sys.readlink(file.path("/proc/self/fd", number)))'
    targets = told(helper, client, code)
    own = ("/dev/null", "pipe:", "/app", "/run/blockyard/launch.R", "/proc/", "/usr/lib/R", "/usr/share", "/tmp")
    assert not [target for target in targets if target not in ("", "NA") and not target.startswith(own)]
    assert targets[0] == "/dev/null"


def test_what_is_shared_cannot_be_written(helper, client):
    places = ("/app", "/", "/usr", "/etc", "/run", "/run/blockyard", "/var")
    code = f'for (p in c{places}) if (file.create(file.path(p, "new"), showWarnings = FALSE)) tell(p)'
    assert told(helper, client, code + '\ntell("tried")') == ["tried"]


def test_what_is_its_own_can_be_written(helper, client):
    code = 'for (place in c("/tmp", "/run/worker", "/dev/shm")) tell(file.create(file.path(place, "new")))'
    assert told(helper, client, code) == ["TRUE"] * 3


def test_tmp_ends_at_its_size(helper, client):
    code = 'tell(system("head -c 20000000 /dev/zero > /tmp/big 2>/dev/null")); tell(file.size("/tmp/big"))'
    status, size = told(helper, client, code, limits={"tmp": 8 << 20})
    assert status != "0"
    assert int(float(size)) <= 8 << 20


def test_it_has_no_privilege_and_cannot_gain_any(helper, client):
    code = """
      status <- readLines("/proc/self/status")
      for (line in grep("^(Cap|NoNewPrivs)", status, value = TRUE)) tell(gsub("\\\\s+", " ", line))
      commands <- c("unshare -U true", "unshare -m true", "mount -t tmpfs none /tmp", "chroot / true", "su -c true")
      for (command in commands)
        tell(system(paste(command, "> /dev/null 2>&1")) != 0)"""
    capabilities = [f"Cap{kind}: {'0' * 16}" for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")]
    assert told(helper, client, code) == [*capabilities, "NoNewPrivs: 1"] + ["TRUE"] * 5


def test_it_sees_and_signals_its_own_processes_alone(helper, client):
    neighbour = helper.run_r(client, "neighbour1", "message('up'); Sys.sleep(600)")
    neighbour.wait_for_output("up")
    code = """
      for (pid in grep("^[0-9]+$", list.files("/proc"), value = TRUE)) tell(readLines(file.path("/proc", pid, "comm")))
      system("kill -9 -1")"""
    worker = helper.run_r(client, "worker0001", PROLOGUE + code)
    helper.result(client, "worker0001")
    seen = {line.split()[1] for line in worker.output().splitlines() if "TOLD" in line}
    assert seen <= {"bwrap", "docker-init", "R"}
    assert client.call("list", id="neighbour1")["workers"][0]["state"] == "running"


def test_the_host_and_other_apps_are_out_of_sight(helper, client):
    other = helper.bundle("other-bundle", {"secret.txt": "secret"})
    paths = [f"{helper.state_dir}/bundles/{other}/secret.txt", str(helper.config), str(helper.socket)]
    assert all(map(os.path.exists, paths))
    code = f"for (path in c({', '.join(map(repr, paths))})) tell(file.exists(path))"
    assert told(helper, client, code) == ["FALSE"] * 3


def test_the_bundle_is_the_working_directory(helper, client):
    files = {"app.R": PROLOGUE + 'tell(getwd()); tell(readLines("data.csv")); quit()', "data.csv": "1,2\n"}
    worker = helper.spawn(client, "worker0001", helper.bundle("files", files))
    helper.result(client, "worker0001")
    assert "TOLD /app\nTOLD 1,2\n" in worker.output()


def test_a_library_is_first_in_the_search_path_and_not_writable(helper, client):
    library = helper.state_dir / "libraries/lib1"
    library.mkdir()
    library.chmod(0o755)
    code = 'tell(.libPaths()[1]); tell(file.create("/library/new", showWarnings = FALSE))'
    assert told(helper, client, code, library="lib1") == ["/library", "FALSE"]


def test_data_that_root_named_is_mounted_as_root_said(stopped_helper):
    root = stopped_helper.root
    for name in ("open", "closed"):
        (root / name).mkdir()
        (root / name).chmod(0o777)
    stopped_helper.configure(
        f'[storage]\nstate_dir = "{stopped_helper.state_dir}"\n'
        f'data_mounts = [{{name = "rw", path = "{root}/open", mode = "rw"}}, {{name = "ro", path = "{root}/closed"}}]\n'
    )
    stopped_helper.start()
    client = stopped_helper.client()
    code = 'for (name in c("rw", "ro")) tell(file.create(file.path("/data", name, "new"), showWarnings = FALSE))'
    assert told(stopped_helper, client, code, data=["rw", "ro"]) == ["TRUE", "FALSE"]
    assert os.listdir(root / "open") == ["new"]


def test_a_scratch_copy_is_writable_and_the_bundle_unchanged(helper, client):
    code = 'tell(file.create("new")); tell(file.create("/app/new", showWarnings = FALSE))'
    assert told(helper, client, code, scratch_copy=True) == ["TRUE", "FALSE"]
    assert os.listdir(helper.state_dir / "bundles/bundle-worker0000") == ["app.R"]


def test_a_probe_runs_in_an_apps_place(helper, client):
    nonce = {"BLOCKYARD_PROBE_NONCE": "n1"}
    worker = helper.spawn(client, "probe00001", None, kind="probe", app="probe", env=nonce)
    worker.wait_for_output('"began"')
    worker.wait_for_output('"ended"')
    client.call("stop", id="probe00001", grace=0)
    assert [json.loads(line).get("ended") for line in worker.output().splitlines()][-1] == "n1"


# --- its log -------------------------------------------------------------------------------------------------------


def test_every_line_of_its_log_arrives_in_order_and_the_pipe_ends_with_it(helper, client):
    code = 'for (i in 1:5000) cat("line", i, "\\n"); message("to standard error"); quit()'
    worker = helper.run_r(client, "worker0001", code)
    helper.result(client, "worker0001")
    lines = [line for line in worker.output().splitlines() if line.startswith("line")]
    assert lines == [f"line {number} " for number in range(1, 5001)]
    assert "to standard error" in worker.output()


def test_a_line_without_end_arrives_whole(helper, client):
    worker = helper.run_r(client, "worker0001", 'cat(strrep("x", 300000)); cat("END"); quit()')
    helper.result(client, "worker0001")
    assert worker.output().count("x") == 300000
    assert worker.output().rstrip().endswith("END")


def test_a_log_that_nobody_reads_holds_up_no_other_worker(helper, client):
    reading, writing = os.pipe2(os.O_CLOEXEC)
    bundle = helper.bundle("chatty", {"app.R": 'repeat cat(strrep("x", 1000), "\\n")'})
    client.call("spawn", (writing,), id="chatty0001", kind="app", app="chatty", bundle=bundle)
    os.close(writing)
    worker = helper.spawn(client, "worker0001", helper.bundle("hello", EXAMPLES / "hello"))
    assert worker.get().startswith("HTTP/1.1 200 OK")
    assert client.call("stop", id="chatty0001", grace=0)["result"]["reason"] == "stopped"
    os.close(reading)


# --- a helper that ends, and comes back --------------------------------------------------------------------------


def test_it_outlives_its_helper_and_is_known_to_the_next(helper, client):
    worker = helper.spawn(client, "worker0001", helper.bundle("hello", EXAMPLES / "hello"), app="hello")
    worker.get()
    helper.end(9)
    assert worker.get().startswith("HTTP/1.1 200 OK")
    helper.start()
    (record,) = helper.client().call("list")["workers"]
    assert (record["id"], record["app"], record["uid"]) == ("worker0001", "hello", worker.uid)
    assert (record["pid"], record["cgroup"], record["state"]) == (worker.pid, worker.cgroup, "running")
    assert helper.client().call("stop", id="worker0001", grace=0)["result"]["reason"] == "stopped"
    assert not helper.leftovers()


def test_one_that_ended_without_a_helper_leaves_nothing(helper, client):
    worker = helper.run_r(client, "worker0001", 'while (!file.exists("/run/worker/go")) Sys.sleep(0.1); quit()')
    helper.end(9)
    (worker.socket.parent / "go").touch()
    eventually(lambda: select.select([worker.pidfd], [], [], 0)[0], "the worker ends")
    helper.start()
    eventually(lambda: not helper.leftovers(), "nothing is left")


# --- what is refused -----------------------------------------------------------------------------------------------

REFUSED = {
    "a path as bundle": ({"bundle": "a/b"}, "malformed"),
    "a bundle that is not there": ({"bundle": "missing"}, "no_such_bundle"),
    "no bundle": ({"bundle": None}, "unknown_kind"),
    "a library that is not there": ({"library": "missing"}, "no_such_library"),
    "data that root did not name": ({"data": ["secrets"]}, "no_such_data"),
    "an unknown kind": ({"kind": "shell"}, "unknown_kind"),
    "a loader's variable": ({"env": {"LD_PRELOAD": "/tmp/x.so"}}, "env_not_allowed"),
    "our own variable": ({"env": {"BLOCKYARD_SOCKET": "/tmp/x"}}, "env_not_allowed"),
    "more processes than root allows": ({"limits": {"pids": 513}}, "limit_above_ceiling"),
    "more of /tmp than root allows": ({"limits": {"tmp": 2**40}}, "limit_above_ceiling"),
    "a uid of its choice": ({"uid": 0}, "malformed"),
    "a command of its choice": ({"argv": ["/bin/sh"]}, "malformed"),
    "an image of its choice": ({"image": "other"}, "malformed"),
    "a runtime of its choice": ({"runtime": "runc"}, "malformed"),
    "a mount of its choice": ({"mounts": ["/:/host"]}, "malformed"),
    "a capability": ({"cap_add": ["SYS_ADMIN"]}, "malformed"),
    "an id that is a path": ({"id": "../../x"}, "malformed"),
    "an option as app": ({"app": "--privileged"}, "malformed"),
    "another network": ({"network": "bridge"}, "malformed"),
    "an access type that is none": ({"access": "root"}, "malformed"),
}


def test_a_forbidden_wish_is_refused_audited_and_changes_nothing(helper):
    fields = {"worker": "worker0001", "bundle": helper.bundle("waiting", {"app.R": WAITING})}
    for name, (wish, code) in REFUSED.items():
        given = fields | {"worker" if key == "id" else key: value for key, value in wish.items()}
        client = helper.client()
        with pytest.raises(Refusal) as refusal:
            helper.spawn(client, **given)
        client.close()  # few are served at a time
        assert (name, refusal.value.code) == (name, code)
        assert refusal.value.message.endswith(".")
    eventually(lambda: not helper.leftovers(), "nothing is left")
    assert helper.client().call("list")["workers"] == []
    refusals = [entry["BLOCKYARD_RESULT"] for entry in helper.audit() if "BLOCKYARD_PEER_UID" in entry]
    assert refusals == [code for _, code in REFUSED.values()]


def test_a_bundle_that_is_a_link_is_refused(helper, client):
    (helper.state_dir / "bundles/link").symlink_to("/etc")
    with pytest.raises(Refusal, match="no_such_bundle"):
        helper.spawn(client, "worker0001", "link")
    eventually(lambda: not helper.leftovers(), "nothing is left")


def test_an_id_is_used_once(helper, client):
    worker = helper.run_r(client, "worker0001", WAITING)
    with pytest.raises(Refusal, match="worker_exists"):
        helper.spawn(client, "worker0001", "bundle-worker0001")
    assert not select.select([worker.pidfd], [], [], 0)[0]


def test_without_a_pipe_for_its_log_nothing_is_started(helper, client):
    bundle = helper.bundle("waiting", {"app.R": WAITING})
    with pytest.raises(Refusal, match="no_log_pipe"):
        client.call("spawn", id="worker0001", kind="app", app="app", bundle=bundle)


def test_nobody_but_the_api_and_root_is_answered(stopped_helper):
    stopped_helper.start()
    if stopped_helper.socket.parent != stopped_helper.root:
        stopped_helper.socket.parent.chmod(0o2711)
    stopped_helper.socket.chmod(0o666)
    with pytest.raises(EOFError):
        stopped_helper.client(user=pwd.getpwnam("nobody"))


def test_limits_above_the_ceiling_are_refused(stopped_helper):
    stopped_helper.configure(memory_ceiling="512m", cpu_ceiling="2")
    stopped_helper.start()
    client, bundle = stopped_helper.client(), stopped_helper.bundle("waiting", {"app.R": WAITING})
    for limits in ({"memory": (512 << 20) + 1}, {"cpu": 2001}):
        with pytest.raises(Refusal, match="limit_above_ceiling"):
            stopped_helper.spawn(client, "worker0001", bundle, limits=limits)
