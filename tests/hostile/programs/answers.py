"""An app that is no Shiny app: it answers on its socket as no honest server would, by the path that is asked for."""

import os
import socket
import threading

PATH = os.environ["BLOCKYARD_SOCKET"]
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nhonest"
SMUGGLED = b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\nSet-Cookie: stolen=1\r\n\r\nsmuggled"


def endless(sock, start, piece):
    """Send without end; return when the other side has had enough."""
    sock.sendall(start)
    while True:
        sock.sendall(piece)


def answer(sock, path):
    """Answer one request."""
    if path == "/two":
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nfirst" + SMUGGLED)
    elif path == "/both":
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED)
    elif path == "/lengths":
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 30\r\n\r\nabc" + SMUGGLED)
    elif path == "/nobody":  # a 304 has no body, whatever it says
        sock.sendall(b"HTTP/1.1 304 Not Modified\r\nContent-Length: 300\r\n\r\n" + SMUGGLED)
    elif path == "/switch":
        sock.sendall(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: mine\r\nConnection: Upgrade\r\n\r\n" + SMUGGLED)
    elif path == "/bare":
        sock.sendall(b"HTTP/1.1 200 OK\nX: a\rSet-Cookie: stolen=1\nContent-Length: 2\n\nok\r\n\r\n")
    elif path == "/headers":
        endless(sock, b"HTTP/1.1 200 OK\r\n", b"X-More: " + b"x" * 1000 + b"\r\n")
    elif path == "/line":
        endless(sock, b"HTTP/1.1 200 OK\r\nX-Long: ", b"x" * 65536)
    elif path == "/interim":
        endless(sock, b"", b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n")
    elif path == "/chunk":
        sock.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n" + SMUGGLED)
    elif path == "/body":
        endless(sock, b"HTTP/1.1 200 OK\r\nContent-Length: 10737418240\r\n\r\n", b"x" * 65536)
    else:
        sock.sendall(OK)


def serve(sock):
    """Answer until the other side goes."""
    with sock:
        data = b""
        try:
            while True:
                while b"\r\n\r\n" not in data:
                    more = sock.recv(65536)
                    if not more:
                        return
                    data += more
                head, _, data = data.partition(b"\r\n\r\n")
                answer(sock, head.split()[1].decode().partition("?")[0])
                if b"\r\nconnection: close" in head.lower():
                    return
        except OSError:
            return


listener = socket.socket(socket.AF_UNIX)
if os.path.lexists(PATH):
    os.unlink(PATH)
listener.bind(PATH)
os.chmod(PATH, 0o660)
listener.listen(64)
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
