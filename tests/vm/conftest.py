"""Keeps the tests in `guest` out of this machine's run: they install the server, and run in the booted ones."""

collect_ignore = ["guest"]
