"""The site's own tests. The fixture ``fake_kuzzle`` comes with refresher."""

import asyncio

import pytest
from django.conf import settings
from django.test import AsyncClient, Client, override_settings


@pytest.fixture(autouse=True)
def kuzzle_url(fake_kuzzle):
    with override_settings(KUZZLE_URL=fake_kuzzle.url, SESSION_ENGINE="django.contrib.sessions.backends.cache"):
        yield


def signed_in(jwt, client):
    session = Client().session
    session["jwt"] = jwt
    session.save()
    client.cookies[settings.SESSION_COOKIE_NAME] = session.session_key
    return client


@pytest.mark.parametrize("fault", ["busy", "down", "gateway_timeout", "late", "portal", "truncated"])
def test_a_fault(fault, fake_kuzzle):
    """Whatever goes wrong while a token is refreshed, users see who they are, sign in, or try again."""
    client = signed_in(fake_kuzzle.login("foo", ago=3590), Client())  # valid for 10 more seconds
    fake_kuzzle.suffer(fault)
    assert client.get("/me").status_code in (200, 302, 503)


def test_a_lost_reply(fake_kuzzle):
    """Kuzzle's answer is lost, and the new token with it: the user is asked to sign in."""
    client = signed_in(fake_kuzzle.login("foo", ago=3590), Client())
    fake_kuzzle.suffer("lost")
    assert client.get("/me").headers["Location"] == "/sign-in"


def test_the_sites_own_session(fake_kuzzle):
    """When it has ended, that is the site's fault, and its users stay signed in."""
    client = signed_in(fake_kuzzle.login("foo"), Client(raise_request_exception=False))
    with override_settings(KUZZLE_TOKEN=fake_kuzzle.login("foo", ago=7200)):
        assert client.get("/site").status_code == 500
    assert client.get("/me").status_code == 200


def test_async(fake_kuzzle):
    """An async view works on an event loop, too."""
    client = signed_in(fake_kuzzle.login("foo"), AsyncClient())
    assert asyncio.run(client.get("/me-async")).json()["_id"] == "foo"
    assert asyncio.run(AsyncClient().get("/me-async")).headers["Location"] == "/sign-in"
