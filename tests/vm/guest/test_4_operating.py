"""What an operator does with the running server, as docs/operate.md tells, and what visitors notice of it."""

import re
import socket
import threading
from contextlib import suppress

import httpx
from conftest import STATE
from documented import block
from machine import active, answers, audit, by, r_process, run, switch_off, systemctl, unit
from running_pair import simple_app, wait_for

PORTS = (8080, 8081)
REQUEST = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"


def test_no_connection_is_refused_while_the_api_restarts(server):
    over, answered, refused = threading.Event(), dict.fromkeys(PORTS, 0), []

    def ask(port):
        while not over.wait(0.05):
            try:
                with socket.create_connection(("127.0.0.1", port), 60) as connection:
                    connection.sendall(REQUEST)
                    with suppress(ConnectionResetError):  # one that the old process had accepted
                        answered[port] += bool(connection.recv(1))
            except ConnectionRefusedError:
                refused.append(port)

    askers = [threading.Thread(target=ask, args=(port,)) for port in PORTS]
    for asker in askers:
        asker.start()
    try:
        systemctl("restart", "blockyard-api.service")
        up = dict(answered)
        wait_for(lambda: all(answered[port] > up[port] for port in PORTS), 60, "answers of the new process")
    finally:
        over.set()
        for asker in askers:
            asker.join()
    assert refused == []


def test_a_visitor_is_served_although_the_spawner_was_stopped(server, plain):
    switch_off(server, plain)  # who comes next needs a worker, and so the spawner
    server.http.post(f"/api/v1/apps/{plain}/enable")
    systemctl("stop", "blockyard-spawner.socket", "blockyard-spawner.service")
    assert unit("blockyard-spawner.service", "ActiveState") == "inactive"
    assert server.visitor().get(f"/app/{plain}/").status_code == 200
    assert [unit(f"blockyard-spawner.{kind}", "ActiveState") for kind in ("service", "socket")] == ["active"] * 2


def test_the_emergency_stop_ends_every_worker_and_its_start_lets_visitors_in_again(server, plain):
    visitor = server.visitor()
    with visitor.shiny(plain):
        worker = active(server, plain)[0]["id"]
        process = r_process(worker)
        systemctl("stop", "blockyard-workers.service")
        assert run("ps", "--pid", str(process), check=False).returncode == 1
    wait_for(lambda: not server.workers(plain), 60, "the end in the API's view")
    assert "quarantined" not in [entry["BLOCKYARD_RESULT"] for entry in audit(worker=worker)]
    refused = server.visitor().get(f"/app/{plain}/")
    assert refused.status_code == 503
    ended = [found for found in server.runtime(plain)["workers"] if found["status"] == "ended"]
    assert "systemctl start blockyard-workers" in max(ended, key=lambda found: found["ended_at"])["end_reason"]
    systemctl("start", "blockyard-workers.service")
    wait_for(lambda: server.visitor().get(f"/app/{plain}/").status_code == 200, 120, "the app again")
    assert unit("blockyard-spawner.service", "ActiveState") == "active"


def test_a_worker_outlives_a_stop_of_the_api_and_goes_on_talking(server):
    chatty = "tick <- function() { message('tick'); later::later(tick, 0.5) }\nlater::later(tick, 0.5)"
    server.deploy("chatty", simple_app(chatty))
    visitor = server.visitor()
    assert visitor.get("/app/chatty/").status_code == 200
    worker = active(server, "chatty")[0]["id"]
    process = r_process(worker)
    systemctl("stop", "blockyard-api.socket", "blockyard-api.service")
    systemctl("start", "blockyard-api.socket")
    answers(server)
    assert [found["id"] for found in active(server, "chatty")] == [worker]
    assert visitor.get("/app/chatty/").status_code == 200
    assert r_process(worker) == process

    def log():
        return server.http.get("/api/v1/apps/chatty/logs", params={"worker_id": worker, "stream": "false"}).text

    kept = int(re.search(r"[0-9]+", run("systemctl", "--version").stdout)[0]) >= 254  # FileDescriptorStorePreserve=
    before = log().count("tick")
    wait_for(lambda: (log().count("tick") > before) if kept else "this log is not kept" in log(), 60, "the log's word")
    server.http.post("/api/v1/apps/chatty/disable")


def test_logs_are_followed_while_a_visitor_is_there(server):
    visitor = server.visitor()
    with visitor.shiny("hello"):
        worker = next(w for w in active(server, "hello") if any(s["websockets"] for s in w["sessions"]))
        following = by(server, "logs", "hello", "--follow", "--worker", worker["id"])
        lines = iter(following.stdout.readline, "")
        assert any("hello: a session began" in line for line in lines)
    assert any("hello: a session ended" in line for line in lines)
    assert following.poll() is None
    server.http.post("/api/v1/apps/hello/disable")
    assert any("worker ended" in line for line in lines)
    assert following.wait(60) == 0
    server.http.post("/api/v1/apps/hello/enable")


def test_a_forgotten_admin_token_is_replaced_as_documented(server):
    program = "/opt/blockyard/venv/bin/blockyard-api"
    once = run("runuser", "-u", "blockyard", "--", program, "token", "--bootstrap").stdout.strip()
    made = server.http.post("/api/v1/bootstrap", json={"token": once})
    assert made.status_code == 201
    as_new = httpx.get(
        f"{server.control_url}/api/v1/users/me", headers={"Authorization": f"Bearer {made.json()['token']}"}, timeout=60
    )
    assert as_new.json()["role"] == "admin"
    assert server.http.post("/api/v1/bootstrap", json={"token": once}).status_code == 410
    journal = run("journalctl", "--unit=blockyard-api", "--quiet").stdout
    assert once not in journal
    assert made.json()["token"] not in journal


def test_a_backup_is_made_and_taken_back_as_documented(server, tmp_path):
    server.deploy("archived", simple_app(ui="fluidPage('as it was')"))
    archived = server.http.get("/api/v1/apps/archived").json()["active_bundle"]
    make = block("operate.md", "sudo apt-get install sqlite3")
    take_back = block("operate.md", "sudo systemctl stop blockyard.target blockyard-api.socket")
    shell(tmp_path, make.partition("\n")[2])  # what that installs is in this image
    made = (STATE / "backup.db", tmp_path / "blockyard-backup.tar.gz")
    assert [oct(path.stat().st_mode & 0o077) for path in made] == ["0o0", "0o0"]  # hashes of tokens, who visits what

    server.deploy("archived", simple_app(ui="fluidPage('as it is not to be')"))
    server.deploy("later", simple_app())
    for bundle in (STATE / "bundles").iterdir():
        run("rm", "-r", str(bundle))  # a new server has none
    shell(tmp_path, take_back)
    answers(server)
    assert "as it was" in server.visitor().get("/app/archived/").text
    assert server.http.get("/api/v1/apps/archived").json()["active_bundle"] == archived
    assert server.http.get("/api/v1/apps/later").status_code == 404
    assert oct((STATE / "blockyard.db").stat().st_mode & 0o077) == "0o0"
    server.http.post("/api/v1/apps/archived/disable")


def shell(directory, script):
    """Run commands of root, who needs no sudo and is without it here."""
    script = script.replace("sudo -u blockyard", "runuser -u blockyard --").replace("sudo ", "")
    run("sh", "-ec", f"cd {directory}\n{script}", timeout=240)
