"""All messages are in one table, to be read in one go: tests/messages.txt."""

from __future__ import annotations

import re

import messages
import pytest

HAPPENED, SOURCES = messages.TABLE.read_text().split(f"\n\n{messages.HEADINGS[1]}\n")
ROWS = [block.splitlines() for block in HAPPENED.split("\n\n")[1:]]


@pytest.fixture(scope="module")
def current():
    """The table as it would be written now."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("refresher._rules.BIRTH_SECOND", 0.0)
        patch.delenv("CIRCLE_WEB3_API_KEY", raising=False)
        return messages.table().split(f"\n\n{messages.HEADINGS[1]}\n")


def test_what_a_caller_is_told(current):
    """What goes wrong is told in the words of the table. If they were improved: python tests/messages.py."""
    assert current[0] == HAPPENED


def test_sources(current):
    """Every sentence in the sources is in the table. If one is new: python tests/messages.py."""
    assert current[1] == SOURCES


@pytest.mark.parametrize("row", [row for row in ROWS if len(row) == 3], ids=lambda row: row[0])
def test_advice(row):
    """Each says in one sentence what the matter is, with whom, and what to do; or what an argument must be."""
    what, kind, text = (line.strip() for line in row)
    assert not re.search(r"[.?!] [A-Z]", text)
    if kind == "InvalidArgumentError":
        assert re.search(r"\b(must|missing|needed|longer)\b", text)
    elif kind != "NotADirectoryError":
        assert re.search(r"\b(try again|call again|sign in again|check the)\b", text)
        assert re.search(r"\b(Kuzzle|Circle|Broken)\b", text), what


def test_every_error_happens():
    """No kind of error is left out."""
    kinds = {row[1].strip() for row in ROWS}
    assert kinds > {"OutcomeUnknownError", "ReplyError", "RequestRefusedError", "SignInRequiredError"}
    assert kinds > {"InvalidArgumentError", "UnavailableError"}
