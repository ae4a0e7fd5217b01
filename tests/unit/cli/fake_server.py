"""A server that answers what a test wants."""

import contextlib
import http.server
import json
import threading
from dataclasses import dataclass, field

APP = {
    "id": "11111111-2222-3333-4444-555555555555", "name": "hello", "status": "running", "enabled": True,
    "access_type": "acl", "title": "", "url": "http://apps/app/hello/", "active_bundle": None,
}  # fmt: skip


@dataclass
class Answers:
    """Answers by method and path below /api/v1; what has none of its own gets `otherwise`.

    Each is (status, content), with headers if need be; text is sent as text, all else as JSON.
    """

    url: str
    to: dict = field(default_factory=dict)
    otherwise: tuple = (404, {"error": "not_found", "message": "There is no such thing."})
    asked: list = field(default_factory=list)  # methods and paths


class Listening(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        """Say nothing: a client that hangs up is what some tests are about."""


@contextlib.contextmanager
def fake_server():
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def __getattr__(self, name):
            if name.startswith("do_"):
                return self.answer
            raise AttributeError(name)

        def answer(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            asked = f"{self.command} {self.path.partition('?')[0].removeprefix('/api/v1/')}"
            answers.asked.append(asked)
            status, content, *headers = answers.to.get(asked, answers.otherwise)
            text = isinstance(content, str)
            data = (content if text else json.dumps(content)).encode() if status != 204 else b""
            self.send_response(status)
            kind = "text/plain; charset=utf-8" if text else "application/json"
            for name, value in {"Content-Type": kind, **(headers[0] if headers else {})}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    with Listening(("127.0.0.1", 0), Handler) as listening:
        answers = Answers(f"http://127.0.0.1:{listening.server_port}")
        thread = threading.Thread(target=listening.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield answers
        finally:
            listening.shutdown()
            thread.join()
