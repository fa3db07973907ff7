"""In a Django site: served by gunicorn, in Celery's workers, from cron, in its own tests."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import attrs
import pytest
import requests

from refresher.testing import Answer, Clock, FakeKuzzle

SITE = Path(__file__).with_name("site")


@pytest.fixture
def clock():
    """A clock that goes on by itself, as the site's does."""
    return Clock()


@pytest.fixture
def old(kuzzle):
    """The site's token: it is due, as it is valid for ten more minutes."""
    return kuzzle.login("foo", ago=3000)


def environment_of(kuzzle, redis_url, jwt, folder):
    """Return what the settings read. The database is there."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")},
        "KUZZLE_URL": kuzzle.url,
        "KUZZLE_TOKEN": jwt,
        "SITE_REDIS": redis_url,
        "SITE_DATABASE": str(folder / "database"),
    }
    subprocess.run([sys.executable, "manage.py", "migrate", "-v0"], cwd=SITE, env=environment, check=True)
    return environment


@pytest.fixture
def environment(kuzzle, valkey_url, old, tmp_path):
    """What the settings read."""
    return environment_of(kuzzle, valkey_url, old, tmp_path)


class Programs:
    """Programs of the site's, which are ended after the tests."""

    def __init__(self, environment, folder):
        self.environment = environment
        self.log = folder / "log"
        self.processes = []

    def start(self, *argv):
        with self.log.open("a") as log:
            command = [sys.executable, "-m", *argv]
            process = subprocess.Popen(command, cwd=SITE, env=self.environment, stdout=log, stderr=log)
        self.processes.append(process)

    def serve(self, *options):
        """Serve the site with gunicorn. Returns its URL."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.start("gunicorn", "shop.wsgi", f"--bind=127.0.0.1:{port}", "--workers=4", "--threads=4", *options)
        deadline = time.monotonic() + 60
        while True:
            try:
                requests.get(f"http://127.0.0.1:{port}/none", timeout=30)
                return f"http://127.0.0.1:{port}"
            except requests.ConnectionError:
                assert time.monotonic() < deadline, self.log.read_text()
                time.sleep(0.05)

    def end(self):
        for process in self.processes:
            process.terminate()
            process.wait(30)


@pytest.fixture
def programs(environment, tmp_path):
    programs = Programs(environment, tmp_path)
    yield programs
    programs.end()


class Browser(requests.Session):
    """A visitor. Redirects are not followed."""

    def __init__(self, url):
        super().__init__()
        self.site = url

    def request(self, method, path, **options):
        options |= {"timeout": 20, "allow_redirects": False}
        return super().request(method, self.site + path, **options)

    def submit(self, path, **data):
        """Post a form, with the token that Django put into it."""
        self.get("/sign-in")
        return self.post(path, data={**data, "csrfmiddlewaretoken": self.cookies["csrftoken"]})

    def sign_in(self, password="bar"):
        return self.submit("/sign-in", username="foo", password=password)

    def me(self):
        """Tell what the site says about the user: a status, and where it leads or who that is."""
        answer = self.get("/me")
        if answer.status_code == 200:
            return 200, answer.json()["_id"]
        return answer.status_code, answer.headers.get("Location", "")


SIGN_IN, TRY_AGAIN = (302, "/sign-in"), (503, "")


def refreshes(kuzzle):
    return [request for request in kuzzle.requests if request.path == "/_refreshToken"]


# In trouble. One site with one worker serves all of these.


@pytest.fixture(scope="module")
def trouble(valkey_url, tmp_path_factory):
    """A site, and the Kuzzle that it uses."""
    folder = tmp_path_factory.mktemp("site")
    with FakeKuzzle() as fake:
        programs = Programs(environment_of(fake, valkey_url, fake.login("foo"), folder), folder)
        yield programs.serve("--workers=1", "--threads=8"), fake
        programs.end()


@pytest.fixture
def service(trouble):
    """That Kuzzle."""
    yield trouble[1]
    trouble[1].next_answers.clear()
    trouble[1].start()


@pytest.fixture
def browser(trouble, service):
    """A visitor, with a site that is well."""
    return Browser(trouble[0])


@pytest.fixture
def user(browser):
    """A visitor who has signed in."""
    assert browser.sign_in().headers["Location"] == "/me"
    assert browser.me() == (200, "foo")
    return browser


@pytest.fixture
def short_lived(browser, service):
    """A visitor whose token is valid for six seconds only."""
    service.next_answers.append(
        lambda request: service.truly(attrs.evolve(request, target=request.target + "?expiresIn=6s"))
    )
    browser.sign_in()
    return browser


def test_not_signed_in(browser, service):
    """Visitors who have not signed in are asked to. Kuzzle is not."""
    before = len(service.requests)
    assert browser.me() == SIGN_IN
    assert browser.get("/me-async").headers["Location"] == "/sign-in"
    assert browser.get("/sign-in").status_code == 200
    assert len(service.requests) == before


def test_async(user):
    """An async view gives the same answer as the other."""
    assert user.get("/me-async").json() == user.get("/me").json()


REFUSED, UNAVAILABLE = 401, 503
TROUBLE = {
    "400": (lambda fake: fake.fail_next("api.assert.missing_argument"), REFUSED, 503),
    "401": (lambda fake: fake.fail_next("security.token.invalid", 2), REFUSED, 302),
    "403": (lambda fake: fake.fail_next("security.rights.forbidden"), UNAVAILABLE, 403),
    "429": (lambda fake: fake.fail_next("api.process.too_many_requests"), UNAVAILABLE, 503),
    "500": (lambda fake: fake.fail_next("services.cache.read_failed"), UNAVAILABLE, 503),
    "502 HTML": (lambda fake: fake.suffer("bad_gateway"), UNAVAILABLE, 503),
    "503": (lambda fake: fake.fail_next("api.process.overloaded"), UNAVAILABLE, 503),
    "200 HTML": (lambda fake: fake.suffer("portal"), UNAVAILABLE, 503),
    "302": (lambda fake: fake.next_answers.append(Answer(302)), UNAVAILABLE, 503),
    "no answer": (lambda fake: fake.suffer("lost"), UNAVAILABLE, 503),
    "down": (lambda fake: fake.stop(), UNAVAILABLE, 503),
}


@pytest.mark.parametrize(("happen", "status", "_"), TROUBLE.values(), ids=TROUBLE)
def test_sign_in_in_trouble(browser, service, happen, status, _):
    """A sign-in that Kuzzle refuses or does not answer is no sign-in, and never a crash."""
    happen(service)
    assert browser.sign_in().status_code == status
    assert browser.me() == SIGN_IN


def test_wrong_password(browser):
    """Who does not know the password may try again, and is let in then."""
    assert "Wrong user name or password." in browser.sign_in("wrong").text
    assert browser.submit("/sign-in").status_code == 401
    assert browser.sign_in().status_code == 302
    assert browser.me() == (200, "foo")


@pytest.mark.parametrize(("happen", "_", "status"), TROUBLE.values(), ids=TROUBLE)
def test_view_in_trouble(user, service, happen, _, status):
    """What Kuzzle says about a request becomes an answer, and the session goes on unless it has ended."""
    happen(service)
    assert user.me()[0] == status
    service.start()
    assert user.me() == (SIGN_IN if status == 302 else (200, "foo"))


def test_down_with_an_expired_token(short_lived, service):
    """When the token expires while Kuzzle is down, users are asked to come back, and to sign in when it is up."""
    assert short_lived.me() == (200, "foo")
    service.stop()
    time.sleep(6.1)
    assert short_lived.me() == TRY_AGAIN
    service.start()
    assert short_lived.me() == SIGN_IN


def test_down_for_a_moment(short_lived, service):
    """When the token is about to expire while Kuzzle is down, the session goes on as soon as it is up."""
    time.sleep(3.1)
    service.pause(0.3)
    assert short_lived.me() == (200, "foo")


def test_sign_out(user, service):
    """Signing out ends the session here and at Kuzzle, with the newest token. It can be done again."""
    service.requests.clear()
    service.clock.advance(3500)
    assert user.me() == (200, "foo")
    assert user.me() == (200, "foo")
    assert user.submit("/sign-out").headers["Location"] == "/sign-in"
    service.clock.advance(1)  # for so long a refreshed token is still valid
    sent = {request.headers["Authorization"] for request in service.requests} - {None}
    assert not [each for each in sent if service.knows(each.split()[1])]
    assert user.me() == SIGN_IN
    assert user.submit("/sign-out").headers["Location"] == "/sign-in"
    assert user.get("/sign-out").status_code == 405


@pytest.mark.parametrize("delay", [0.0, 0.3], ids=["", "slow"])
def test_sign_out_in_two_tabs(user, service, delay):
    """Two tabs sign out at once. Both see the sign-in page, and a third that loads a page then does, too."""
    token = user.cookies["csrftoken"]
    service.delay_next(delay, 2)

    def sign_out(_):
        tab = Browser(user.site)
        tab.cookies.update(user.cookies)
        return tab.post("/sign-out", data={"csrfmiddlewaretoken": token})

    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(sign_out, range(2)))
    assert [(answer.status_code, answer.headers["Location"]) for answer in answers] == [SIGN_IN] * 2
    assert user.me() == SIGN_IN


def test_sign_out_while_a_page_loads(user, service):
    """A page that was loading while another tab signed out leads to the sign-in page."""
    tab = Browser(user.site)
    tab.cookies.update(user.cookies)
    service.next_answers.append(lambda request: (time.sleep(0.5), service.truly(request))[1])
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(tab.me)
        time.sleep(0.1)
        user.post("/sign-out", data={"csrfmiddlewaretoken": user.cookies["csrftoken"]})
        assert loading.result() == SIGN_IN


@pytest.mark.parametrize("happen", [TROUBLE[name][0] for name in ("429", "503", "502 HTML", "down")])
def test_sign_out_in_trouble(user, service, happen):
    """Who cannot sign out at Kuzzle is still signed in here, and can try again."""
    token = {"csrfmiddlewaretoken": user.cookies["csrftoken"]}
    happen(service)
    answer = user.post("/sign-out", data=token)
    service.start()
    if answer.status_code == 503:
        assert user.me() == (200, "foo")
        answer = user.post("/sign-out", data=token)
    assert answer.headers["Location"] == "/sign-in"
    assert user.me() == SIGN_IN


def test_session_ended_elsewhere(user, service):
    """A session that was ended at Kuzzle ends here, too, also by signing out."""
    tab = Browser(user.site)
    tab.sign_in()
    service.fail_next("security.token.invalid", 2)
    assert user.me() == SIGN_IN
    service.fail_next("security.token.invalid", 2)
    assert tab.post("/sign-out", data={"csrfmiddlewaretoken": tab.cookies["csrftoken"]}).status_code == 302
    assert tab.me() == SIGN_IN


# In operation


@pytest.mark.parametrize("preload", [[], ["--preload"]], ids=["", "preload"])
def test_gunicorn(kuzzle, programs, preload):
    """4 workers of 4 threads, hit by 64 browsers at once, refresh once, and log that."""
    url = programs.serve(*preload)
    kuzzle.delay_next(0.3)
    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(lambda _: requests.get(f"{url}/site", timeout=20).json()["_id"], range(256)))
    assert set(answers) == {"foo"}
    assert len(refreshes(kuzzle)) == 1
    assert len(re.findall(r": ok, 1 attempt, \d+\.\d{3} s$", programs.log.read_text(), re.MULTILINE)) == 1


def test_a_user(kuzzle, programs):
    """A user signs in, works on when the token is about to expire, and is asked to sign in when it's over."""
    browser = Browser(programs.serve("--workers=1"))
    browser.sign_in()
    kuzzle.clock.advance(3500)
    assert [browser.me() for _ in range(4)] == [(200, "foo")] * 4
    assert len(refreshes(kuzzle)) == 1
    kuzzle.clock.advance(3700)
    assert browser.me() == SIGN_IN


def test_atomic_requests(kuzzle, programs):
    """A request that refreshes and fails is undone in the database. The new token stays."""
    browser = Browser(programs.serve())
    browser.sign_in()
    kuzzle.clock.advance(3500)
    assert browser.get("/broken").status_code == 500
    assert browser.me() == (200, "foo")
    assert len(refreshes(kuzzle)) == 1


def test_celery(kuzzle, programs, environment):
    """Tasks in several processes are given the first token, and refresh once."""
    old = kuzzle.login("foo", ago=3000)  # not in its last moments, however long the workers take to start
    programs.start("celery", "--app=shop", "worker", "--concurrency=4", "--loglevel=WARNING")
    code = f"""
        from shop.tasks import get_kuid
        results = [get_kuid.delay({old!r}) for _ in range(32)]
        print({{result.get(timeout=30) for result in results}})
    """
    kuzzle.delay_next(0.3)
    assert run(environment, "-c", textwrap.dedent(code)) == "{'foo'}\n"
    assert len(refreshes(kuzzle)) == 1


def test_celery_process_that_ends(kuzzle, programs, environment):
    """A process of a worker that ends lets a refresh finish that its task has left behind."""
    old = kuzzle.login("foo", ago=3000)
    programs.start("celery", "--app=shop", "worker", "--concurrency=1", "--max-tasks-per-child=1", "--loglevel=WARNING")
    code = f"""
        from shop.tasks import get_kuid
        print([get_kuid.delay({old!r}).get(timeout=30) for _ in range(2)])
    """
    kuzzle.delay_next(6.0)
    kuzzle.grace = 60.0  # tasks go on with the old one meanwhile
    assert run(environment, "-c", textwrap.dedent(code)) == "['foo', 'foo']\n"
    kuzzle.clock.advance(70)
    assert run(environment, "-c", textwrap.dedent(code)) == "['foo', 'foo']\n"
    assert len(refreshes(kuzzle)) == 1


def run(environment, *argv):
    return subprocess.run(
        [sys.executable, *argv], cwd=SITE, env=environment, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def test_keepalive(kuzzle, environment):
    """The management command refreshes all sessions that are due, and says in one line why it can't."""
    due = {**environment, "KUZZLE_TOKEN": kuzzle.login("foo", ago=3000)}
    assert run(due, "manage.py", "keepalive").startswith("1 refreshed, ")
    assert run(due, "manage.py", "keepalive").startswith("0 refreshed, ")
    assert len(refreshes(kuzzle)) == 1
    dead = {**environment, "KUZZLE_TOKEN": kuzzle.login("foo", ago=7200)}
    assert " 1 ended" in run(dead, "manage.py", "keepalive")
    command = [sys.executable, "manage.py", "keepalive"]
    due = {**environment, "KUZZLE_TOKEN": kuzzle.login("foo", ago=3100), "KUZZLE_URL": "http://127.0.0.1:1"}
    down = subprocess.run(command, cwd=SITE, env=due, check=False, capture_output=True, text=True)
    assert down.returncode == 1
    assert re.match("CommandError: [1-9][0-9]* sessions were skipped: Kuzzle could not", down.stderr.splitlines()[-1])
    assert "Traceback" not in down.stderr


def test_the_sites_own_tests(environment):
    """The tests of the example pass."""
    options = ["-p", "no:cacheprovider", "-W", "error", "-c", os.devnull, "--rootdir", ".", "--confcutdir", "."]
    assert "9 passed" in run(environment, "-m", "pytest", *options, "shop/tests.py")


def test_memory_in_tests(environment, tmp_path):
    """With the cache of many test settings, they pass if the site does what its README says, and only then."""
    site = shutil.copytree(SITE, tmp_path / "site")
    kuzzle = (site / "shop" / "kuzzle.py").read_text().replace("DjangoStore,", "DjangoStore, MemoryStore,")
    with (site / "shop" / "settings.py").open("a") as file:
        file.write('TESTING = True\nCACHES["default"] = {"BACKEND": "django.core.cache.backends.locmem.LocMemCache"}\n')
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", ".", "shop/tests.py"]
    (advice,) = re.findall("`(tokens = .*)`", (SITE / "README.md").read_text())
    for line, last in (("tokens = TokenCache(DjangoStore(), ahead=900)", "9 failed in"), (advice, "9 passed in")):
        (site / "shop" / "kuzzle.py").write_text(re.sub("^tokens = .*", line, kuzzle, flags=re.MULTILINE))
        out = subprocess.run(command, cwd=site, env=environment, check=False, capture_output=True, text=True).stdout
        assert last in out.splitlines()[-1]


def test_settings(environment):
    """``manage.py check`` has nothing to say about the cache."""
    assert run(environment, "manage.py", "check") == "System check identified no issues (0 silenced).\n"
