"""
The manual page, written from the parser of the command line.

``python tests/manpage.py`` writes ``refresher/refresher.1`` anew, which the wheel installs for ``man refresher``.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT)] if __name__ == "__main__" else []

from refresher import __version__  # noqa: E402
from refresher._cli import _parser  # noqa: E402

PAGE = ROOT / "refresher" / "refresher.1"
ESCAPES = {"\\": r"\e", "-": r"\-", "'": r"\(aq", "~": r"\(ti", "^": r"\(ha"}


def escape(text: str) -> str:
    """Write a line so that troff prints it as it is."""
    text = re.sub(r"[\\'~^-]", lambda found: ESCAPES[found[0]], text)
    return rf"\&{text}" if text.startswith(".") else text


def paragraphs(text: str) -> Iterator[str]:
    """Write paragraphs down. What is indented stays as it is."""
    for number, paragraph in enumerate(text.strip().split("\n\n")):
        yield from [".PP"] if number else []
        is_example = False
        for line in paragraph.splitlines():
            if line.startswith("  ") is not is_example:
                is_example = not is_example
                yield from [".PP", ".RS 4", ".EX"] if is_example else [".EE", ".RE", ".PP"]
            yield escape(line.strip())
        yield from [".EE", ".RE"] if is_example else []


def arguments(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """List what a command takes, except for other commands."""
    return [each for each in parser._actions if not isinstance(each, argparse._SubParsersAction)]


def commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """List the commands below a command."""
    found = [each.choices for each in parser._actions if isinstance(each, argparse._SubParsersAction)]
    return dict(found[0]) if found else {}


def value(action: argparse.Action) -> str:
    """Write down what stands for the value of an option, or for an argument."""
    if action.nargs == 0:
        return ""
    return rf"\fI{escape(str(action.metavar or '|'.join(map(str, action.choices or [action.dest]))))}\fR"


def synopsis(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Write down how each command is called."""
    below = commands(parser)
    for each in below.values():
        yield from synopsis(each)
    if not below:
        names = [value(each) for each in arguments(parser) if not each.option_strings]
        options = [r"[\fIOPTION\fR]..."] if len(arguments(parser)) > len(names) + 1 else []
        yield rf"\fB{escape(parser.prog)}\fR {' '.join([*options, *names])}".rstrip()
        yield ".br"


def describe(parser: argparse.ArgumentParser, above: str | None = None) -> Iterator[str]:
    """Describe a command and its options, and those below it. *above* has been said already."""
    names = "".join(rf" {value(each)}" for each in arguments(parser) if not each.option_strings)
    yield rf'.SS "\fB{escape(parser.prog)}\fR{names}"'
    if parser.description != above:
        yield from paragraphs(parser.description or "")
    for action in arguments(parser):
        if "--help" not in action.option_strings:
            names = ", ".join(rf"\fB{escape(name)}\fR" for name in action.option_strings)
            yield from [".TP", " ".join(filter(None, [names, value(action)]))]
            yield escape(parser._get_formatter()._expand_help(action))
    for each in commands(parser).values():
        yield from describe(each, parser.description)


def page() -> str:
    """Write the page."""
    parser = _parser()
    about, statuses, environment = (parser.description or "").strip().split("\n\n")
    changelog = (ROOT / "CHANGELOG.md").read_text()
    date = re.search(rf"^## \[{re.escape(__version__)}\] - (\S+)$", changelog, re.MULTILINE)
    assert date, f"CHANGELOG.md has no date for {__version__}"
    lines = [
        r".\" Written by tests/manpage.py from the parser of the command line.",
        f'.TH REFRESHER 1 "{date[1]}" "refresher {__version__}" "User Commands"',
        ".SH NAME",
        r"refresher \- keep Kuzzle and Circle sessions alive",
        ".SH SYNOPSIS",
        *synopsis(parser),
        ".SH DESCRIPTION",
        *paragraphs(about),
        ".SH COMMANDS",
        *(line for each in commands(parser).values() for line in describe(each)),
        ".SH OPTIONS",
        *[".TP", r"\fB\-\-help\fR", "Print help. Each command has its own."],
        *[".TP", r"\fB\-\-version\fR", "Print the version."],
        '.SH "EXIT STATUS"',
    ]
    for status, meaning in re.findall(r"^ +(\d+) +(.*)$", statuses, re.MULTILINE):
        lines += [".TP", rf"\fB{status}\fR", escape(meaning)]
    lines.append(".SH ENVIRONMENT")
    for name, meaning in re.findall(r"^ +([A-Z_]+) +(.*(?:\n {3,}.*)*)", environment, re.MULTILINE):
        lines += [".TP", rf"\fB{escape(name)}\fR", *(escape(line.strip()) for line in meaning.splitlines())]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
