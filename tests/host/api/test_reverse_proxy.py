"""What docs/install.md has an operator write, taken from that page: a browser and `by` come through his nginx."""

import os
import shutil
import socket
import subprocess

import pytest
from chromium import launched, move_the_slider, opened
from documented import block
from running_pair import HELLO, Pair, simple_app, wait_for
from test_command_line import BY

CONTROL, APP = "blockyard.example.com", "hello.apps.example.com"
SHOWS_WHO_ASKS = simple_app(
    ui="function(request) fluidPage(request$HTTP_X_FORWARDED_FOR, request$HTTP_X_FORWARDED_PROTO)"
)


@pytest.fixture(scope="module")
def pair():
    section, lines = "", []
    for line in map(str.strip, block("install.md", "[server]\n").splitlines()):
        if line.startswith("["):
            section = line.strip("[]")
        elif line:
            lines.append(f"{section}.{line}")
    with Pair("proxied", "\n".join(lines)) as running:
        yield running


@pytest.fixture(scope="module")
def certificate(pair):
    made = pair.root / "example.pem"
    names = f"subjectAltName=DNS:{CONTROL},DNS:*.apps.example.com"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", f"/CN={CONTROL}",
         "-addext", names, "-out", made, "-keyout", pair.root / "example.key"],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    return made


@pytest.fixture(scope="module")
def nginx(pair, certificate):
    """The port of an nginx with the page's server blocks; other names for its port and files, and for the pair's."""
    with socket.create_server(("127.0.0.1", 0)) as trial:
        port = trial.getsockname()[1]
    servers = block("install.md", "ssl_certificate ")
    instead = {
        "/etc/ssl/example.pem": certificate,
        "/etc/ssl/private/example.key": certificate.with_suffix(".key"),
        "listen 443 ssl": f"listen 127.0.0.1:{port} ssl",
        "http://127.0.0.1:8081": pair.relay_origin,
        "http://127.0.0.1:8080": pair.control_url,
    }
    for documented, own in instead.items():
        assert documented in servers
        servers = servers.replace(documented, str(own))
    directory = pair.root / "nginx"
    directory.mkdir()
    places = "".join(
        f"{kind}_temp_path {directory}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    configuration = directory / "nginx.conf"
    configuration.write_text(
        f"daemon off; pid {directory}/pid; error_log {directory}/error.log; events {{}}\n"
        f"http {{ access_log off; {places}\n{servers}\n}}\n"
    )
    with subprocess.Popen(["nginx", "-e", directory / "error.log", "-c", configuration]) as running:
        try:
            wait_for(lambda: _listens(port), what="nginx")
            yield port
        finally:
            running.terminate()


def _listens(port):
    with socket.socket() as trial:
        return trial.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def by(pair, certificate, nginx, tmp_path):
    """A function that runs `by` as on another machine, which knows the server by its name and certificate."""
    hosts = tmp_path / "hosts"
    hosts.write_text(f"127.0.0.1 localhost {CONTROL} {APP}\n")
    environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "SSL_CERT_FILE": str(certificate), "LANG": "C.UTF-8"}

    def run(*arguments):
        inside = f'mount --bind {hosts} /etc/hosts && exec {BY} "$@"'
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", inside, "by", *arguments],
            env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=90, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("login", "--server", f"https://{CONTROL}:{nginx}", "--token", pair.token)
    return run


@pytest.fixture
def page(nginx):
    resolver = f"--host-resolver-rules=MAP *.example.com:443 127.0.0.1:{nginx}"
    with launched(resolver) as chromium, opened(chromium, ignore_https_errors=True) as page:
        yield page


def test_a_page_is_deployed_opened_by_the_servers_name_and_used_on_the_apps_own(pair, by, page):
    app = pair.root / "hello"
    shutil.copytree(HELLO, app)
    (app / "data.bin").write_bytes(os.urandom(3 << 20))  # more than nginx takes by itself
    by("deploy", str(app), "--name", "hello", "--yes", "--wait")
    by("update", "hello", "--access", "public")

    page.goto(f"https://{CONTROL}/app/hello/")
    page.wait_for_selector("#histogram img")  # drawn over a WebSocket
    assert page.url == f"https://{APP}/"
    (cookie,) = [cookie for cookie in page.context.cookies() if cookie["name"] == "__Host-blockyard_route"]
    assert cookie["secure"]
    assert cookie["domain"] == APP
    move_the_slider(page)
    assert "Hello from Blockyard" in page.inner_text("body")
    assert '"active_sessions": 1' in by("get", "hello", "--runtime", "--json")


def test_an_app_is_told_the_visitors_own_address_and_that_he_came_by_https(pair, by, page):
    pair.deploy("hello", SHOWS_WHO_ASKS)
    page.set_extra_http_headers({"X-Forwarded-For": "203.0.113.9", "X-Forwarded-Proto": "http"})  # his own lies
    page.goto(f"https://{APP}/")
    page.wait_for_selector("text=https")
    assert "203.0.113.9" not in page.inner_text("body")
