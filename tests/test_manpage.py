"""The manual page says what the command line says."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess

import manpage
import pytest


def test_is_current():
    """The page is what the parser says. If not: python tests/manpage.py."""
    assert manpage.PAGE.read_text() == manpage.page()


def test_says_all():
    """Every command and every option is on the page."""
    told = re.sub(r"\\(.)", lambda found: found[1] if found[1] == "-" else found[0], manpage.page())
    stack = [manpage._parser()]
    while stack:
        parser = stack.pop()
        stack += manpage.commands(parser).values()
        assert parser.prog in told
        for action in manpage.arguments(parser):
            assert all(name in told for name in action.option_strings if name.startswith("--"))


@pytest.mark.skipif(shutil.which("groff") is None, reason="groff is not installed")
def test_troff_reads_it():
    """troff finds no fault with the page, and shows the crontab as one types it."""
    command = ["groff", "-man", "-ww", "-Tascii", "-P-cbou", str(manpage.PAGE)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert "*/5 * * * * refresher kuzzle $KUZZLE --quiet <~/.kuzzle-token >/dev/null\n" in done.stdout
    assert "REFRESHER_KEY" in done.stdout.partition("\nENVIRONMENT\n")[2]


def test_is_installed():
    """An install puts the page where man looks for it. .ci/run compares it with what a wheel installs."""
    setup = configparser.ConfigParser()
    setup.read(manpage.ROOT / "setup.cfg")
    assert setup["options.data_files"]["share/man/man1"] == str(manpage.PAGE.relative_to(manpage.ROOT))
    assert "share/man/man1/refresher.1" in (manpage.ROOT / ".ci" / "run").read_text()
