"""Random requests, thrown at a FakeKuzzle and at a real Kuzzle: both answer alike."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import random
import time
import zlib
from http.cookiejar import DefaultCookiePolicy

import pytest
import requests

from refresher.testing import FakeKuzzle

SEED = 20261121
COUNT = 500

# Routes that the fake has, and what stands beside them. A real Kuzzle has many more: PUT and DELETE are left
# out where they make and delete indexes there.
ROUTES = [
    *[("POST", "/_refreshToken")] * 40,
    *[("POST", "/_checkToken")] * 16,
    *[("POST", "/_login/local")] * 16,
    *[("POST", "/_logout")] * 12,
    *[("GET", "/_me")] * 6,
    ("GET", "/users/_me"),
    ("GET", "/_login/local"),
    ("POST", "/api-keys/_create"),
    ("POST", "//_refreshToken/"),
    ("POST", "/_refreshToken//"),
    ("POST", "/%5FrefreshToken"),
    ("POST", "/_login/nope"),
    ("POST", "/_login"),
    ("POST", "/_login/local/nope"),
    ("POST", "/nope"),
    ("GET", "/_refreshToken"),
    ("PUT", "/_refreshToken"),
    ("HEAD", "/"),
    ("HEAD", "/_me"),
    ("PATCH", "/_me"),
    ("PATCH", "/_refreshToken"),
    ("OPTIONS", "/_refreshToken"),
    ("OPTIONS", "/nope"),
    ("TRACE", "/_me"),
    ("PURGE", "/_refreshToken"),
]
TOKENS = [*["good"] * 14, "spent", "spent", "garbage", "expired", "ended", "infinite", "api key", "empty"]
LIFETIMES = """
    2h|90m|1d|7200000|-1|-2h|500|0|garbage||0.5|1.00015s|1.5h|9007199254740991|8500000000000000|1mo
    |99999999999999999999
"""
ARGUMENTS = [
    *[("expiresIn", lifetime) for lifetime in LIFETIMES.replace("\n", "").replace(" ", "").split("|")],
    *[("cookieAuth", value) for value in ("", "true", "false", "1")] * 4,
    ("strategy", ""),
    ("strategy", "local"),
    ("strategy", "nope"),
    ("triggerEvents", ""),
    ("global", ""),
    ("pretty", ""),
    ("index", "i"),
    ("collection", "c"),
    ("requestId", "x"),
    ("body", "x"),
    ("volatile", "{}"),
    ("controller", "auth"),
    ("controller", "nope"),
    ("controller", ""),
    *[("action", name) for name in ("login", "logout", "getCurrentUser", "checkToken", "refreshToken", "nope")],
    ("username", "foo"),
    ("password", "bar"),
    ("unknown", "x"),
]
CREDENTIALS = [
    *[{"username": "foo", "password": "bar"}] * 6,
    {"username": "foo", "password": "wrong"},
    {"username": "nobody", "password": "bar"},
    {"username": "foo"},
    {"username": "foo", "password": 5},
    {"username": 5, "password": "bar"},
    {"username": ["foo"], "password": {"x": "bar"}},
    {"username": "", "password": ""},
]
VALUES = [
    {},
    [],
    [1],
    None,
    0,
    5,
    True,
    False,
    "",
    "x",
    {"token": None},
    {"token": 5},
    {"token": ["x"]},
    {"length": 0},
]
VALUES += [{"description": 5}, {"expiresIn": "2h", "cookieAuth": True}]
BROKEN = [b"{", b"NaN", b"[]x", b"\xef\xbb\xbf{}", b'{"token":"\xff"}', b'{"a": 1,}', b"token=x"]
TYPES = [
    "text/plain",
    "APPLICATION/JSON",
    "application/json, text/plain",
    "application/jsonx",
    ";application/json",
]
TYPES += [
    "application/json; charset=UTF-8",
    "application/json;charset=latin1",
    "application/json ; x",
    "multipart/form-data",
]
VOLATILES = ["x", "5", "null", "[]", "{}", '{"a": 1}', '{"sdkVersion": "1"}', '{"sdkName": "js@5.0.0"}']
VOLATILES += ['{"sdkName": "js@7.1.0"}', '{"sdkName": 5}', '{"sdkName": "js@10.0.0"}']

# Two tokens of one second with one lifetime are one token: each has a lifetime that no other test asks for.
_lifetimes = itertools.count(random.randrange(200_000, 2_000_000), 9)


def draw_body(rng, path):
    """Draw a body, with its type and how it is packed. A token in it is a placeholder."""
    usual = {"/_login/local": "credentials", "/_checkToken": "token"}.get(path, "none")
    kind = usual if rng.random() < 0.75 else rng.choice(["none", "credentials", "token", "value", "broken"])
    if kind == "none":
        body, headers = b"", {}
    elif kind == "broken":
        body, headers = rng.choice(BROKEN), {"Content-Type": "application/json"}
    else:
        choices = {"credentials": CREDENTIALS, "token": [{"token": f"<{rng.choice(TOKENS)}>"}], "value": VALUES}
        value = rng.choice(choices[kind])
        shape = rng.choice(["json"] * 4 + ["form", "multipart"]) if isinstance(value, dict) else "json"
        if shape == "json":
            body, headers = json.dumps(value).encode(), {"Content-Type": "application/json"}
        else:
            fields = [(name, str(item)) for name, item in value.items()]
            given = {"data": fields} if shape == "form" else {"files": [(name, (None, item)) for name, item in fields]}
            prepared = requests.Request("POST", "http://x", **given).prepare()
            body, headers = (
                prepared.body or b"",
                {"Content-Type": prepared.headers.get("Content-Type", TYPES[0])},
            )
            body = body if isinstance(body, bytes) else body.replace("%3C", "<").replace("%3E", ">").encode()
    if rng.random() < 0.05:
        headers["Content-Type"] = rng.choice(TYPES)
    if rng.random() < 0.1:
        names = [
            "gzip",
            "deflate",
            "identity",
            "br",
            "gzip, deflate",
            "GZIP",
            "identity,identity,identity,identity",
            ",",
        ]
        headers["Content-Encoding"] = rng.choice(names)
    return body, headers


def draw(rng):
    """Draw a request. It names the tokens that each Kuzzle has its own of: ``<good>``."""
    method, path = rng.choice(ROUTES)
    arguments = rng.sample(ARGUMENTS, rng.choice([0, 0, 0, 1, 1, 2, 3]))
    if rng.random() < 0.05:
        arguments.append(("jwt", f"<{rng.choice(TOKENS)}>"))
    if arguments and rng.random() < 0.05:
        arguments.append(rng.choice(arguments))
    body, headers = draw_body(rng, path)
    if rng.random() < 0.2 if path.startswith("/_login") else rng.random() < 0.65:
        scheme = rng.choice(["Bearer "] * 12 + ["bearer ", "Bearer  ", "Basic ", ""])
        headers["Authorization"] = f"{scheme}<{rng.choice(TOKENS)}>"
    if rng.random() < 0.2:
        token = f"<{rng.choice(TOKENS)}>"
        shapes = ["authToken={}"] * 6 + [
            "a=b; authToken={} ; c",
            "authToken={}; authToken=x",
            'authToken="{}"',
            "authtoken={}",
        ]
        headers["Cookie"] = rng.choice([*shapes, "authToken=null", "authToken", "authToken=%", "a=b"]).format(token)
    for name, values in (
        ("X-Kuzzle-Volatile", VOLATILES),
        ("X-Kuzzle-Request-Id", ["some-id"]),
        ("Origin", ["http://localhost"]),
        ("Accept-Encoding", ["deflate", "identity", "gzip;q=0.1, deflate;q=0.5", "br"]),
        ("X", ["x" * 3000, "x" * 4096]),
    ):
        if rng.random() < (0.01 if name == "X" else 0.06):
            headers[name] = rng.choice(values)
    return {"method": method, "path": path, "arguments": arguments, "headers": headers, "body": body}


class Side:
    """One of the two, and tokens of all kinds that it has issued."""

    def __init__(self, url):
        self.url = url
        self.session = requests.Session()
        self.session.trust_env = False
        self.session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        self.expired = self.login("1s")
        made = self.send("POST", "/api-keys/_create", self.bearer(), b'{"description": "x"}').json()["result"]
        self.api_key, self.api_key_id = made["_source"]["token"], made["_id"]

    def bearer(self):
        return {"Authorization": f"Bearer {self.login()}"}

    def send(self, method, target, headers=None, body=b""):
        plain = {"Accept-Encoding": "identity", "Accept": None, "User-Agent": None, "Connection": None}
        return self.session.request(
            method, self.url + target, headers={**plain, **(headers or {})}, data=body, timeout=10
        )

    def login(self, lifetime=None):
        target = f"/_login/local?username=foo&password=bar&expiresIn={lifetime or f'{next(_lifetimes)}s'}"
        return self.send("POST", target).json()["result"]["jwt"]

    def token(self, kind):
        if kind in ("garbage", "empty"):
            return "kauth-garbage" if kind == "garbage" else ""
        if kind in ("expired", "api key"):
            return self.expired if kind == "expired" else self.api_key
        jwt = self.login("-1" if kind == "infinite" else None)
        if kind in ("spent", "ended"):
            target = "/_refreshToken" if kind == "spent" else "/_logout"
            assert self.send("POST", target, {"Authorization": f"Bearer {jwt}"}).status_code == 200
        return jwt

    def ask(self, request):
        """Send a request and tell what came of it."""
        tokens = {}

        def fill(text):
            for kind in set(TOKENS):
                if f"<{kind}>" in text:
                    tokens[kind] = tokens.get(kind) or self.token(kind)
                    text = text.replace(f"<{kind}>", tokens[kind])
            return text

        headers = {name: fill(value) for name, value in request["headers"].items()}
        query = "&".join(f"{name}={fill(value)}" if value else name for name, value in request["arguments"])
        body = request["body"]
        if b"<" in body:
            body = fill(body.decode()).encode()
        for encoding in request["headers"].get("Content-Encoding", "").split(","):
            pack = {"gzip": gzip.compress, "deflate": zlib.compress}.get(encoding.strip())
            body = pack(body) if pack and body else body
        response = self.send(request["method"], request["path"] + (f"?{query}" if query else ""), headers, body)
        told = describe(response)
        for kind in ("good", "infinite"):
            if kind in tokens:
                after = self.send("POST", "/_refreshToken", {"Authorization": f"Bearer {tokens[kind]}"})
                told[f"the {kind} token afterwards"] = (
                    after.status_code,
                    (after.json()["error"] or {}).get("id"),
                )
        return told

    def close(self):
        # Kuzzle looks for API keys among a user's first ten. (The fake keeps them.)
        self.send("DELETE", f"/api-keys/{self.api_key_id}?refresh=wait_for", self.bearer())
        self.session.close()


def describe(response):
    """Tell what there is to an answer, except for times and tokens."""
    told = {"status": response.status_code}
    names = (
        "Access-Control-Allow-Origin",
        "Connection",
        "Content-Encoding",
        "Content-Type",
        "Vary",
        "X-Kuzzle-Node",
    )
    told |= {name: response.headers.get(name) for name in names}
    cookie = response.headers.get("Set-Cookie")
    if cookie is not None:
        parts = cookie.split("; ")
        value = parts[0] if parts[0] == "authToken=null" else parts[0][:16]
        told["cookie"] = [value, *(part[:7] for part in parts[1:]), "1969" in cookie]
    if response.request.method == "HEAD":
        return told
    try:
        body = response.json()
    except ValueError:
        return {**told, "shape": "HTML", "text": response.text[:20]}
    error = body.get("error") if "requestId" in body else body
    told |= {"shape": "enveloped" if "requestId" in body else "bare", "members": sorted(body)}
    told |= {name: body.get(name) for name in ("action", "controller", "volatile", "index", "collection")}
    told["request id"] = body.get("requestId") == "some-id"
    if error is not None:
        told |= {"id": error.get("id"), "code": error.get("code"), "error status": error.get("status")}
    result = body.get("result")
    if isinstance(result, dict) and error is None:
        told["result"] = {name: shown(name, value) for name, value in result.items()}
    return told


def shown(name, value):
    if name in ("kuid", "valid", "state", "ttl", "acknowledged", "strategies"):
        return value
    if name == "expiresAt":
        return value if value in (None, -1) else round(value / 10_000)
    return type(value).__name__ if name != "_source" else sorted(value.keys() - {"_kuzzle_info", "name", "token"})


def differences(fake_url, real_url, seed, count):
    """Throw random requests at both, and list those that they answer differently."""
    rng = random.Random(seed)
    sides = [Side(fake_url), Side(real_url)]
    time.sleep(1.1)  # until the expired tokens are
    found = []
    for number in range(count):
        request = draw(rng)
        fake, real = (side.ask(request) for side in sides)
        differing = {name for name in fake.keys() | real.keys() if not same(name, fake.get(name), real.get(name))}
        if differing:
            found.append(
                {
                    "number": number,
                    **request,
                    "fake": {name: fake.get(name) for name in sorted(differing)},
                    "real": {name: real.get(name) for name in sorted(differing)},
                }
            )
    for side in sides:
        side.close()
    return found


def same(name, one, other):
    if (
        name == "result"
        and one
        and other
        and isinstance(one.get("expiresAt"), int)
        and isinstance(other.get("expiresAt"), int)
    ):
        return {**one, "expiresAt": 0} == {**other, "expiresAt": 0} and abs(
            one["expiresAt"] - other["expiresAt"]
        ) <= 100
    return one == other


def test_differential():
    """Status, error, shape, members, cookies and what becomes of the token are the same."""
    url = os.environ.get("REFRESHER_TEST_KUZZLE_URL")
    if not url:
        pytest.skip("no real Kuzzle: REFRESHER_TEST_KUZZLE_URL is not set")
    with FakeKuzzle() as fake:
        found = differences(fake.url, url.rstrip("/"), SEED, COUNT)
    assert not found, "\n".join(map(str, found))


def test_fake_answers_everything():
    """The fake has an answer to each of these requests, and never one that it doesn't mean."""
    rng = random.Random(SEED)
    with FakeKuzzle() as fake:
        side = Side(fake.url)
        told = [side.ask(draw(rng)) for _ in range(COUNT // 2)]
        side.close()
    assert {answer["status"] for answer in told} <= {200, 400, 401, 404, 413, 431, 500}
    assert all("id" in answer for answer in told if answer["status"] == 500)
