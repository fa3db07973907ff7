"""What the README shows is run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import refresher
from refresher import SHARED_CACHE, CircleAuth, refresh_user_token
from refresher._cli import main
from refresher.testing import Clock

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCK = re.compile(
    r"(?:<!-- (?P<file>\S+) -->\n)?^```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE
)
BLOCKS = [match.groupdict() for match in BLOCK.finditer(README)]


def blocks(kind):
    """The blocks of a kind that are neither quoted from a file nor run as doctests."""
    texts = [each["text"] for each in BLOCKS if each["kind"] == kind and not each["file"]]
    return [text for text in texts if ">>>" not in text]


@pytest.fixture
def clock():
    """A clock that goes on by itself."""
    return Clock()


@pytest.fixture(autouse=True)
def shared_cache():
    SHARED_CACHE.clear()


def test_every_block_is_run():
    """Each is quoted from a file, or run by one of the tests here or as a doctest; but for the diagram."""
    assert {each["kind"] for each in BLOCKS} == {"crontab", "python", "sh", "text"}
    assert len(blocks("text")) == 1
    assert README.count("```") == 2 * len(BLOCKS)
    assert not re.search(r"^    \S.*\n\n", re.sub(BLOCK, "", README), re.MULTILINE)  # nor is any indented


@pytest.mark.parametrize("block", [each for each in BLOCKS if each["file"]], ids=lambda block: block["file"])
def test_quotation(block):
    """What is quoted from a file is in it, word for word."""
    assert block["text"] in (ROOT / block["file"]).read_text()


def test_python(kuzzle, circle, monkeypatch, capsys):
    """The examples run from top to bottom, as a reader would type them, and tell no secret."""
    monkeypatch.setenv("CIRCLE_WEB3_API_KEY", circle.api_key)
    monkeypatch.setenv("KUZZLE_JWT", kuzzle.login("foo", "5h", ago=60))
    for call in (refresh_user_token, CircleAuth.__init__):
        monkeypatch.setitem(call.__kwdefaults__, "base_url", circle.url)
    names = {
        "jwt": kuzzle.login("foo", ago=60),
        "credentials": {"username": "foo", "password": "bar"},
        "old": circle.sign_in(),
    }
    for number, text in enumerate(blocks("python")):
        names["other_jwt"] = kuzzle.login("foo", f"{number + 6}h", ago=60)
        here = text.replace("https://kuzzle.example.com", kuzzle.url)
        exec(here.replace("https://api.circle.com", circle.url), names)
    out = capsys.readouterr().out
    assert out.startswith("foo 20")
    assert "'id': 'user-1'" in out
    assert "sign in again" not in out
    assert not [secret for secret in [*kuzzle._sessions, *circle._pairs] if secret in out]
    assert {request.headers["Authorization"] for request in kuzzle.requests} > {None}


@pytest.fixture
def shell(kuzzle):
    """Run what a person types, or cron."""

    def shell(text):
        (Path.home() / ".kuzzle-token").write_text(kuzzle.login("foo", ago=60))
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        text = text.replace("https://kuzzle.example.com", kuzzle.url)
        command = ["sh", "-euc", text]
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True)

    return shell


def test_script(kuzzle, shell):
    """The script runs, and asks Kuzzle as the user."""
    _, script = blocks("sh")
    assert '"_id": "foo"' in shell(script).stdout
    assert [request.path for request in kuzzle.requests] == ["/_refreshToken", "/_me"]


def test_installation():
    """The two commands of the installation are run where nothing is installed yet, by .ci/run."""
    install, _ = blocks("sh")
    steps = (ROOT / ".ci" / "run").read_text()
    for line, last in zip(install.splitlines(), ("refresher demo", "pytest"), strict=True):
        assert re.fullmatch(f"pip install .* && {last} +# .*", line)
        assert f"'^pip install .* && {last} ' README.md" in steps


def test_crontab(kuzzle, shell):
    """The line in the crontab runs, and says nothing."""
    (line,) = blocks("crontab")
    match = re.fullmatch(r"\*/5 \* \* \* \* (.*)\n", line)
    result = shell(match[1])
    assert (result.stdout, result.stderr) == ("", "")
    assert [request.path for request in kuzzle.requests] == ["/_refreshToken"]


def test_options(capsys):
    """Every option of the command line is explained, and none that is not there."""
    shown = set()
    for command in ("kuzzle", "circle"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        shown |= set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))
    section = README.partition("## Cron")[2].partition("## Notebooks")[0]
    explained = set(re.findall(r"`(--[a-z][a-z-]+)", section))
    assert explained == shown - {"--help"}


def test_links():
    """Links within the page lead somewhere."""
    titles = re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    there = {re.sub(r"[^a-z -]", "", title.lower()).replace(" ", "-") for title in titles}
    assert set(re.findall(r"\]\(#(.*?)\)", README)) <= there


def test_public_names():
    """What people import is spoken of."""
    for name in refresher.__all__:
        assert name in README or name in ("Store", "UserToken", "__version__"), name
