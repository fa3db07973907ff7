"""The site's own tests."""

import pytest
from django.conf import settings
from django.test import Client, override_settings

pytest_plugins = ["refresher.testing"]


@pytest.fixture(autouse=True)
def kuzzle_url(fake_kuzzle):
    with override_settings(KUZZLE_URL=fake_kuzzle.url, SESSION_ENGINE="django.contrib.sessions.backends.cache"):
        yield


def signed_in(jwt):
    client = Client()
    session = client.session
    session["jwt"] = jwt
    session.save()
    client.cookies[settings.SESSION_COOKIE_NAME] = session.session_key
    return client


def test_a_lost_reply(fake_kuzzle):
    """Kuzzle's answer is lost, and the new token with it: the user is asked to sign in, and sees no error."""
    client = signed_in(fake_kuzzle.login("foo", ago=3590))  # it lives for 10 more seconds
    fake_kuzzle.lose_next()
    assert client.get("/me").headers["Location"] == "/sign-in"


def test_a_slow_reply(fake_kuzzle):
    """Kuzzle is slow: the user goes on with the token that lives."""
    client = signed_in(fake_kuzzle.login("foo", ago=3590))
    fake_kuzzle.delay_next(3)
    assert client.get("/me").json()["_id"] == "foo"
