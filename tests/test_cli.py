"""The command line."""

from __future__ import annotations

import re
import runpy
import sys

import pytest

import refresher
from refresher._cli import main


def test_demo(capsys):
    """The demo tells of both refreshes and shows no secret."""
    assert main(["demo"]) == 0
    out = capsys.readouterr().out
    assert "POST /_refreshToken?expiresIn=2h" in out
    assert "POST /v1/w3s/users/token/refresh" in out
    assert re.search(r"old token <secret \w{8}>: refused\n +new token <secret \w{8}>: good", out)
    assert "the same pair again: yes" in out
    assert re.search(r"kauth-|eyJ|fake-secret", out) is None
    # What was sent is the old token, what came is another.
    assert len(set(re.findall("<secret (.*?)>", out))) == 8


def test_version(capsys):
    """--version tells the version."""
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"refresher {refresher.__version__}\n"


@pytest.mark.parametrize("argv", [[], ["nonsense"]])
def test_usage(capsys, argv):
    """A wrong command line ends with status 2 and a usage on standard error."""
    with pytest.raises(SystemExit, match="2"):
        main(argv)
    assert capsys.readouterr().err.startswith("usage: refresher")


def test_module(monkeypatch, capsys):
    """python -m refresher is the same command."""
    monkeypatch.setattr(sys, "argv", ["refresher", "demo"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("refresher", run_name="__main__")
    assert capsys.readouterr().out.startswith("KUZZLE.")
