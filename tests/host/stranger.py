"""A program at somebody's address: it prints what it is asked, and answers as an API without apps would."""

import http.server
import socket
import sys


class Stranger(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        print(self.requestline, dict(self.headers))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"apps": [], "total": 0}')


class Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6 if "[" in sys.argv[1] else socket.AF_INET


host, _, port = sys.argv[1].rpartition(":")
server = Server((host.strip("[]"), int(port)), Stranger)
print("listening")
server.serve_forever()
