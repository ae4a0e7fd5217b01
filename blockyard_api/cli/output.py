"""What a command prints: tables for people, JSON for programs, and nothing that drives the terminal.

Names, titles and log lines come from apps and their visitors. On a terminal their control characters are shown, not
sent: they could otherwise rewrite what stands there. Piped text passes unchanged, for what reads it is no terminal.

With --json, standard output has JSON and standard error nothing but one JSON object, if the command fails.
"""

import json
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from blockyard_api.cli.client import Failure

# C0 but tab and newline, DEL, C1, what reorders the text around it, and what no encoding can write.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
STANDARD_OUTPUT = Path("-")  # where a command takes a file to write
_PIPE_WIDTH = 10_000  # a table that is piped is never cut
_ID_SHOWN = 12  # characters; commands take what begins an id
_EXACT_TIME = re.compile(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d:\d\d)(?:\.\d+)?Z")


def harmless(text: str) -> str:
    """Return the text with what drives a terminal written as escapes; CR, as progress bars use it, becomes LF."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text.replace("\r\n", "\n").replace("\r", "\n"))


class Output:
    """Where a command's results go."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        self.interactive = not as_json and sys.stdin.isatty() and sys.stderr.isatty()
        self._terminal = sys.stdout.isatty()
        self._console = Console(
            highlight=False, emoji=False, markup=False, width=None if self._terminal else _PIPE_WIDTH
        )
        self._notes = Console(stderr=True, highlight=False, emoji=False, markup=False, soft_wrap=True)

    def result(self, data: object, sentence: str) -> None:
        """Print what a command did: the data as JSON, or a sentence."""
        if self.as_json:
            self._write_json(data)
        else:
            self._console.print(harmless(sentence), soft_wrap=True)

    def content(self, content: bytes) -> None:
        """Print a file's content as it is, in either form. Raises Failure."""
        if self._terminal and b"\0" in content:
            raise Failure("not_text", "This is no text; send it into a file or a pipe.")
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()

    def table(
        self,
        data: object,
        headings: Sequence[str],
        rows: Iterable[Sequence[object]],
        *,
        empty: str,
        ids: Collection[str] = (),
    ) -> None:
        """Print rows, the whole data as JSON, or the sentence `empty` where there are no rows.

        A terminal gets the beginning of what is in the columns `ids`, on one line, and times to the second.
        """
        listed = list(rows)
        if self.as_json:
            self._write_json(data)
        elif not listed:
            self.note(empty)
        else:
            self._console.print(self._grid(headings, listed, ids))

    def record(self, data: object, fields: Iterable[tuple[str, object]]) -> None:
        """Print one thing's fields, one a line, or the data as JSON."""
        if self.as_json:
            self._write_json(data)
        else:
            self._console.print(self._grid((), fields))

    def stream(self, pieces: Iterable[str], *, empty: str) -> None:
        """Pass a log on as it comes: as it is, or one JSON object for each line."""
        nothing = True
        for text in _lines(pieces) if self.as_json else pieces:
            nothing = nothing and not text
            if self.as_json:
                sys.stdout.write(json.dumps({"line": text}) + "\n")
            else:
                sys.stdout.write(harmless(text) if self._terminal else text)
            sys.stdout.flush()
        if nothing:
            self.note(empty)

    def note(self, sentence: str) -> None:
        """Say to people something that is not the result."""
        if not self.as_json:
            self._notes.print(harmless(sentence))

    def failure(self, code: str, message: str) -> None:
        """Say why the command failed, on standard error in either form."""
        if self.as_json:
            sys.stderr.write(json.dumps({"error": code, "message": message}) + "\n")
        else:
            self._notes.print(Text("Error: ", style="bold red"), harmless(message), sep="")

    def confirm(self, question: str, otherwise: str) -> bool:
        """Ask on the terminal. Where nobody can answer, or JSON is wanted, raises Failure that says `otherwise`."""
        if not self.interactive:
            raise Failure("not_confirmed", otherwise)
        self._notes.print(harmless(question), "[y/N] ", end="")
        return sys.stdin.readline().strip().lower() in {"y", "yes"}

    def progress(self) -> Progress:
        """Return a bar for an upload, which only a terminal shows."""
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        return Progress(*columns, console=self._notes, disable=self.as_json or not self._notes.is_terminal)

    def _grid(self, headings: Sequence[str], rows: Iterable[Sequence[object]], ids: Collection[str] = ()) -> Table:
        table = Table(box=None, pad_edge=False, show_header=bool(headings), header_style="bold")
        for heading in headings:
            table.add_column(heading.upper(), no_wrap=not self._terminal or heading in ids, overflow="fold")
        for row in rows:
            cells = [_cell(value) for value in row]
            if headings and self._terminal:
                cells = [
                    cell[:_ID_SHOWN] if heading in ids else _EXACT_TIME.sub(r"\1 \2Z", cell)
                    for cell, heading in zip(cells, headings, strict=True)
                ]
            table.add_row(*map(Text, cells))
        return table

    def _write_json(self, data: object) -> None:
        sys.stdout.write(json.dumps(data, indent=2) + "\n")
        sys.stdout.flush()


def _lines(pieces: Iterable[str]) -> Iterator[str]:
    unfinished = ""
    for piece in pieces:
        *lines, unfinished = (unfinished + piece).split("\n")
        yield from lines
    if unfinished:
        yield unfinished


def _cell(value: object) -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return harmless(str(value)).replace("\n", "\\n")


def size(number: int | None) -> str | None:
    """Return bytes as people read them."""
    if number is None:
        return None
    for unit, width in (("GB", 30), ("MB", 20), ("KB", 10)):
        if number >= 1 << width:
            return f"{number / (1 << width):.1f} {unit}"
    return f"{number} B"
