"""Whatever the schema allows, and much that it does not: never a 5xx, always OpenAI's error body."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import not_a_server_error
from support.api_app import ADMIN_KEY, ApiWorld

_CASES_PER_ROUTE = 12
_bounded = settings(
    max_examples=_CASES_PER_ROUTE,
    derandomize=True,  # the same requests on every run
    database=None,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize(
    ("mode", "as_admin"),
    [
        pytest.param(schemathesis.GenerationMode.POSITIVE, False, id="valid-tenant"),
        pytest.param(schemathesis.GenerationMode.NEGATIVE, False, id="invalid-tenant"),
        pytest.param(schemathesis.GenerationMode.POSITIVE, True, id="valid-admin"),
    ],
)
def test_no_generated_request_breaks_the_server(tmp_path: Path, mode: Any, as_admin: bool) -> None:
    world = ApiWorld(tmp_path / "uploads")

    async def prepare() -> str:
        await world.publish("sql")
        return await world.key()

    tenant_key = asyncio.run(prepare())
    headers = {"Authorization": f"Bearer {ADMIN_KEY if as_admin else tenant_key}"}
    schema = schemathesis.openapi.from_asgi("/openapi.json", world.app)
    tried = 0

    def check(case: schemathesis.Case) -> None:
        nonlocal tried
        tried += 1
        response = case.call(headers=headers)
        case.validate_response(response, checks=[not_a_server_error])
        assert response.headers["x-request-id"]
        if response.status_code >= 400 and case.path != "/readyz":
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}, case

    for operation in schema.get_all_operations():
        with suppress(Unsatisfiable):  # a route without parameters cannot be asked wrongly
            _bounded(given(case=operation.ok().as_strategy(generation_mode=mode))(check))()
    assert tried > 100
