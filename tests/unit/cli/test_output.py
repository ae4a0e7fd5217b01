"""What commands print cannot drive the terminal it is printed on."""

import io
import json
import sys

import pytest

from blockyard_api.cli.client import Failure
from blockyard_api.cli.output import Output, harmless, size


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Put a terminal where standard output was, for the rest of the test."""
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    return screen


HOSTILE = "\x1b]0;title\x07\x1b[2J\x9b31m\u202eabc"


def test_what_drives_a_terminal_is_shown_instead() -> None:
    assert harmless(HOSTILE) == "\\x1b]0;title\\x07\\x1b[2J\\x9b31m\\x202eabc"
    assert harmless("\ud800") == "\\xd800"
    assert harmless("plain\tüñ 日本 🙂\n") == "plain\tüñ 日本 🙂\n"
    assert harmless("10%\r20%\r\ndone") == "10%\n20%\ndone"


def test_a_log_on_a_terminal_is_harmless(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal(monkeypatch)
    Output(as_json=False).stream(["one\n", HOSTILE], empty="nothing")
    assert "\x1b" not in screen.getvalue()
    assert "one\n" in screen.getvalue()


def test_a_log_in_a_pipe_is_what_the_app_wrote(capsys: pytest.CaptureFixture[str]) -> None:
    Output(as_json=False).stream(["one\n", HOSTILE], empty="nothing")
    assert capsys.readouterr().out == "one\n" + HOSTILE


def test_a_log_as_json_is_one_object_a_line_however_it_arrives(capsys: pytest.CaptureFixture[str]) -> None:
    Output(as_json=True).stream(["fir", "st\nsec", "ond\n\nlast"], empty="nothing")
    lines = [json.loads(line)["line"] for line in capsys.readouterr().out.splitlines()]
    assert lines == ["first", "second", "", "last"]


def test_a_table_on_a_terminal_shows_hostile_names_and_obeys_no_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal(monkeypatch)
    Output(as_json=False).table(None, ["name"], [["[bold]x[/bold]" + HOSTILE], ["two\nlines"]], empty="none")
    shown = screen.getvalue()
    assert "[bold]x[/bold]" in shown
    assert "\x1b]" not in shown
    assert "two\\nlines" in shown


def test_a_table_in_a_pipe_is_plain_and_uncut(capsys: pytest.CaptureFixture[str]) -> None:
    Output(as_json=False).table(None, ["name", "title"], [["a", "x" * 500], ["b", None]], empty="none")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [["NAME", "TITLE"], ["a", "x" * 500], ["b", "-"]]


def test_an_empty_table_is_a_sentence_beside_the_output(capsys: pytest.CaptureFixture[str]) -> None:
    Output(as_json=False).table([], ["name"], [], empty="There are no apps.")
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "There are no apps.\n"


def test_a_failure_is_one_sentence_or_one_json_object_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    Output(as_json=False).failure("not_found", "There is no such app.\x1b[2J")
    Output(as_json=True).failure("not_found", "There is no such app.")
    printed = capsys.readouterr()
    assert printed.out == ""
    first, second = printed.err.splitlines()
    assert first == "Error: There is no such app.\\x1b[2J"
    assert json.loads(second) == {"error": "not_found", "message": "There is no such app."}


def test_where_nobody_can_answer_a_question_the_refusal_says_how() -> None:
    with pytest.raises(Failure, match="Add --yes to delete"):
        Output(as_json=False).confirm("Delete?", "Add --yes to delete.")


def test_json_is_wanted_by_programs_which_are_asked_nothing_and_told_nothing_beside_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr(sys, "stderr", Terminal())
    output = Output(as_json=True)
    output.note("Packed 1 file.")
    with pytest.raises(Failure, match="Add --yes"):
        output.confirm("Delete?", "Add --yes to delete.")
    assert sys.stderr.getvalue() == ""
    assert Output(as_json=False).interactive


WORKER = "0123456789abcdef0123456789abcdef"
ROW = [WORKER, "ended; the worker used more than 512 MB of memory", WORKER, "2026-01-02T03:04:05.678Z"]


def test_a_terminal_of_80_columns_shows_what_identifies_on_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal(monkeypatch)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "dumb")
    use = "2 visitors, 31 % CPU, 123.4 MB of 512.0 MB"
    headings = ("worker", "status", "bundle", "started", "use")
    Output(as_json=False).table(None, headings, [[*ROW, use]], empty="none", ids={"worker", "bundle"})
    shown = screen.getvalue()
    assert shown.count("0123456789ab ") == 2
    assert "0123456789abc" not in shown
    assert "2026-01-02" in shown
    assert "03:04:05Z" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_a_pipe_has_ids_and_times_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    Output(as_json=False).table(None, ("worker", "status", "bundle", "at"), [ROW], empty="none", ids={"worker"})
    assert capsys.readouterr().out.splitlines()[1].split("  ")[0] == WORKER
    Output(as_json=False).table(None, ("at",), [[ROW[3]]], empty="none")
    assert ROW[3] in capsys.readouterr().out


def test_colour_is_off_where_no_color_asks_so(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal(monkeypatch)
    Output(as_json=False).table(None, ["name"], [["a"]], empty="none")
    assert "\x1b[1m" in screen.getvalue()
    screen.truncate(0)
    monkeypatch.setenv("NO_COLOR", "1")
    Output(as_json=False).table(None, ["name"], [["a"]], empty="none")
    assert "\x1b[3" not in screen.getvalue()


@pytest.mark.parametrize(("number", "shown"), [(None, None), (0, "0 B"), (1536, "1.5 KB"), (3 << 30, "3.0 GB")])
def test_sizes_are_written_as_people_read_them(number: int | None, shown: str | None) -> None:
    assert size(number) == shown
