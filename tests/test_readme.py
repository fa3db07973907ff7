"""What the README shows is run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import refresher
from refresher import SHARED_CACHE, CircleAuth, refresh_user_token, testing
from refresher._cli import main
from refresher.testing import Clock

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCK = re.compile(r"(?:<!-- (?P<file>\S+) -->\n)?^```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)
BLOCKS = [match.groupdict() for match in BLOCK.finditer(README)]
SITE = Path("tests", "site")
SITE_README = (ROOT / SITE / "README.md").read_text()
QUOTED = [(ROOT, each) for each in BLOCKS if each["file"]]
QUOTED += [(ROOT / SITE, each.groupdict()) for each in BLOCK.finditer(SITE_README) if each["file"]]


def blocks(kind):
    """The blocks of a kind that are neither quoted from a file nor run as doctests."""
    texts = [each["text"] for each in BLOCKS if each["kind"] == kind and not each["file"]]
    return [text for text in texts if ">>>" not in text]


def section(title):
    """What stands under a title."""
    return README.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


@pytest.fixture
def clock():
    """A clock that goes on by itself."""
    return Clock()


@pytest.fixture(autouse=True)
def shared_cache():
    SHARED_CACHE.clear()


def test_length():
    """It is read in five minutes."""
    assert len(README.split()) <= 1600


def test_every_block_is_run():
    """Each is quoted from a file, or run by one of the tests here or as a doctest; but for the diagram."""
    assert {each["kind"] for each in BLOCKS} == {"crontab", "python", "sh", "text"}
    assert len(blocks("text")) == 1
    for text in (README, SITE_README):
        assert text.count("```") == 2 * len(BLOCK.findall(text))
        assert not re.search(r"^    \S.*\n\n", re.sub(BLOCK, "", text), re.MULTILINE)  # nor is any indented


@pytest.mark.parametrize(
    ("folder", "block"), QUOTED, ids=[f"{folder.name}-{block['file']}" for folder, block in QUOTED]
)
def test_quotation(folder, block):
    """What is quoted from a file is in it, word for word."""
    assert f"\n{block['text']}" in f"\n{(folder / block['file']).read_text()}"


def test_python(kuzzle, circle, monkeypatch, capsys):
    """The examples run from top to bottom, as a reader would type them, and show no secret."""
    monkeypatch.setenv("CIRCLE_WEB3_API_KEY", circle.api_key)
    monkeypatch.setenv("KUZZLE_JWT", kuzzle.login("foo", "5h", ago=60))
    for call in (refresh_user_token, CircleAuth.__init__):
        monkeypatch.setitem(call.__kwdefaults__, "base_url", circle.url)
    pair = circle.sign_in()
    names = {
        "jwt": kuzzle.login("foo", ago=60),
        "user_token": pair.user_token,
        "refresh_token": pair.refresh_token,
        "other_jwt": kuzzle.login("foo", "6h", ago=60),
    }
    for name in names:
        assert f"# {name} " in README or f" and {name} are" in README, "a reader is told what it is"
    for text in blocks("python"):
        here = text.replace("https://kuzzle.example.com", kuzzle.url)
        exec(here.replace("https://api.circle.com", circle.url), names)
    out = capsys.readouterr().out
    kuzzle_line, circle_line, name, user, outcome, state = out.splitlines()
    assert (outcome, state) == ("fresh None", "fresh")
    assert kuzzle_line.startswith("foo 20")
    assert circle_line.startswith("user-1 20")
    assert name == "foo"
    assert "'id': 'user-1'" in user
    assert not [secret for secret in [*kuzzle._sessions, *circle._pairs] if secret in out]
    kuzzle.assert_spent_once(names["other_jwt"])
    assert [request.path for request in kuzzle.requests].count("/_logout") == 1
    assert names["auth"] is not None
    assert {request.headers["Authorization"] for request in kuzzle.requests} > {None}


def test_sign_out(kuzzle, monkeypatch):
    """The session that the example signs out has ended at Kuzzle."""
    names = {}
    (text,) = (text for text in blocks("python") if "sign_out" in text and "session.auth" in text)
    exec(text.partition("\nauth =")[0].replace("https://kuzzle.example.com", kuzzle.url), names)
    (request,) = (request for request in kuzzle.requests if request.path == "/_logout")
    assert not kuzzle.knows(request.headers["Authorization"].removeprefix("Bearer "))
    assert names["auth"].jwt is None


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
    """The script runs, asks Kuzzle as the user, signs the user out, and leaves no token behind."""
    _, script = blocks("sh")
    shown = shell(script).stdout
    assert re.search('"_id": ?"foo"', shown)
    assert '"state": "fresh"' in shown
    assert [request.path for request in kuzzle.requests] == ["/_refreshToken", "/_me", "/_logout"]
    last = kuzzle.requests[-1].headers["Authorization"].split()[1]
    assert not kuzzle.knows(last)
    kept = [path for path in Path.home().rglob("*") if path.is_file() and path.name != ".kuzzle-token"]
    assert kept
    assert not [path for path in kept if last in path.read_text()]


def test_script_fails(kuzzle, shell):
    """A script that gets no token sends nothing, and ends with the status that says why."""
    _, script = blocks("sh")
    kuzzle.fail_next("security.token.invalid")
    with pytest.raises(subprocess.CalledProcessError) as ended:
        shell(script)
    assert ended.value.returncode == 77
    assert [request.path for request in kuzzle.requests] == ["/_refreshToken"]


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


def test_crontab_in_help(kuzzle, shell, capsys):
    """So do the two lines in the command's own help."""
    with pytest.raises(SystemExit):
        main(["kuzzle", "--help"])
    shown = re.search(r"^ +(KUZZLE=.*\n) +\*/5 \* \* \* \* (.*)$", capsys.readouterr().out, re.MULTILINE)
    result = shell(shown[1] + shown[2])
    assert (result.stdout, result.stderr) == ("", "")
    assert [request.path for request in kuzzle.requests] == ["/_refreshToken"]


def test_exit_statuses(capsys):
    """The exit statuses are those of the command's own help."""
    with pytest.raises(SystemExit):
        main(["kuzzle", "--help"])
    listed = re.findall(r"^ +(\d+) +\w", capsys.readouterr().out.partition("xit status")[2], re.MULTILINE)
    assert re.findall(r"\b(\d+) (?:nothing|fix|check|try|sign)", section("Cron").replace("\n", " ")) == listed


def test_contributing():
    """What a contributor is told to run is there."""
    told = section("Contributing")
    assert "`python -m tests`" in told
    named = re.findall(r"`python (tests/\w+(?:\.py)?)`|`(tests/\w+\.py)`|`(refresher/\w+)`", told)
    assert len(named) >= 7
    for path in ("".join(each) for each in named):
        assert (ROOT / path).is_file() or (ROOT / path / "__main__.py").is_file() or (ROOT / path).is_dir(), path


def test_unknown_benchmark():
    """A benchmark that is not there is complained about, and those there are are named."""
    command = [sys.executable, str(ROOT / "tests" / "benchmarks"), "auths", "nosuch"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("There is no table nosuch. There are circle_refresh, ")


RESULTS = {"KeepAliveOutcome", "KuzzleToken", "SessionStatus", "UserToken"}


def test_names():
    """What people import is spoken of, and nothing that is not there."""
    for name in set(refresher.__all__) - RESULTS - {"SHARED_CACHE", "Store", "__version__"}:
        assert name in README, name
    for name in re.findall(r"`(\w*Contract|Fake\w+|\w*Store|\w*Error|\w*Auth|TokenCache)\b", README):
        assert hasattr(refresher, name) or hasattr(testing, name), name


def test_extras():
    """The extras are those of the package."""
    there = (ROOT / "setup.cfg").read_text().partition("[options.extras_require]")[2].partition("\n[")[0]
    named = set(re.findall(r"(?:refresher|\.)?\[([a-z]+)\](?!\()", re.sub("`", "", README)))
    assert named == set(re.findall(r"^(\w+) *=", there, re.MULTILINE))


def test_links():
    """Links lead to files that are there, or within the page."""
    titles = re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    there = {"#" + re.sub(r"[^a-z -]", "", title.lower()).replace(" ", "-") for title in titles}
    for link in re.findall(r"\]\((?!https?:)(.*?)\)", README):
        assert link in there or (ROOT / link).is_file(), link
