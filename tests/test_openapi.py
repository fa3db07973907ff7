"""What goes to FakeCircle and comes from it is what Circle's OpenAPI document says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import requests
from helpers import call_with
from openapi_core import OpenAPI
from openapi_core.exceptions import OpenAPIError
from openapi_core.testing import MockRequest, MockResponse

from refresher import RefreshError, refresh_user_token
from refresher.testing import Answer, FakeCircle

pytestmark = pytest.mark.usefixtures("single")

DOCUMENT = Path(__file__).with_name("circle-refresh.openapi.json")
CIRCLE = OpenAPI.from_file_path(str(DOCUMENT))
STATUSES = {
    path: set(operations["post"]["responses"]) for path, operations in json.loads(DOCUMENT.read_text())["paths"].items()
}


class ValidatedCircle(FakeCircle):
    """Holds each request, and each answer with a documented status, against the document."""

    def __init__(self):
        super().__init__()
        self.validated = []
        self.violations = []

    def receive(self, request):
        answer = super().receive(request)
        asked = MockRequest(
            "https://api.circle.com",
            request.method,
            request.path,
            headers=dict(request.headers),
            data=request.body,
        )
        body = json.dumps(answer.body).encode()
        answered = MockResponse(body, answer.status, dict(answer.headers), "application/json")
        try:
            CIRCLE.validate_request(asked)
            if str(answer.status) in STATUSES[request.path]:
                CIRCLE.validate_response(asked, answered)
                self.validated.append((request.path.rpartition("/")[2], answer.status))
        except OpenAPIError as error:
            self.violations.append(error)
        return answer


@pytest.fixture
def circle():
    with ValidatedCircle() as fake:
        yield fake


def refresh(circle, pair, **changes):
    return refresh_user_token(**call_with(circle, pair, **changes))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        pytest.param({"api_key": "x"}, [("refresh", 401)], id="API key"),
        pytest.param({"user_token": "a.b.c"}, [("refresh", 401)], id="user token"),
        pytest.param({"device_id": "other"}, [("refresh", 400)], id="device"),
        pytest.param({"user_token": None, "user_id": "nobody"}, [("token", 404)], id="user id"),
    ],
)
def test_refusals(circle, changes, expected):
    """Refusals."""
    with pytest.raises(RefreshError):
        refresh(circle, circle.sign_in("user-1"), **changes)
    assert circle.violations == []
    assert circle.validated == expected


def test_parameters(circle):
    """A wrong parameter violates the document, and FakeCircle's refusal of it does not."""
    response = requests.post(
        circle.url + "/v1/w3s/users/token/refresh",
        json={"idempotencyKey": "x", "refreshToken": 5},
        headers={"Authorization": f"Bearer {circle.api_key}", "X-User-Token": "x"},
        timeout=5,
    )
    assert (response.status_code, response.json()["code"]) == (400, 2)
    assert [error["location"] for error in response.json()["errors"]] == [
        "idempotencyKey",
        "refreshToken",
        "deviceId",
    ]
    assert len(circle.violations) == 1
    assert "RequestBody" in type(circle.violations[0]).__name__


def test_no_json(circle):
    """Nor does its refusal of a body that is no JSON."""
    response = requests.post(
        circle.url + "/v1/w3s/users/token",
        data=b"{",
        headers={"Authorization": f"Bearer {circle.api_key}"},
        timeout=5,
    )
    assert (response.status_code, response.json()["code"]) == (400, 2)
    assert len(circle.violations) == 1


def test_the_validator_finds_faults(circle):
    """An answer that is not as documented would be found."""
    circle.next_answers.append(Answer(200, {"data": {"encryptionKey": "x"}}, {"Content-Type": "application/json"}))
    with pytest.raises(RefreshError):
        refresh(circle, circle.sign_in())
    assert len(circle.violations) == 1
