"""Connects to where a worker has no business, and says what came of it: "connected", or the error's name."""

import errno
import socket
import sys


def main(kind, *where):
    """Try one address: unix PATH, seqpacket PATH, abstract NAME, tcp HOST PORT, or http HOST PORT."""
    try:
        if kind in ("unix", "abstract"):
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect("\0" + where[0] if kind == "abstract" else where[0])
        elif kind == "seqpacket":
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
                sock.connect(where[0])
        else:
            with socket.create_connection((where[0], int(where[1])), timeout=5) as sock:
                if kind == "http":
                    sock.sendall(
                        b"GET /api/v1/apps HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
                        b"X-Shiny-User: admin\r\nX-Shiny-Access: owner\r\n\r\n"
                    )
                    return sock.recv(64).split(b"\r\n")[0].decode()
    except TimeoutError:
        return "timeout"
    except OSError as error:
        return errno.errorcode[error.errno]
    return "connected"


sys.stdout.write(main(*sys.argv[1:]) + "\n")
