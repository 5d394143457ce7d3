"""Generated requests from the document that a real deployment serves, over HTTP."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from faults.served import SMALL, Victim, make_model, target_of
from http_fixtures import Target
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from test_http_schema import (
    CHECKS,
    OPERATIONS,
    document,
    test_a_served_model_is_named,
    test_every_parameter_has_type_and_bounds,
    test_every_route_is_documented,
)

__all__ = [
    "document",
    "test_a_served_model_is_named",
    "test_every_parameter_has_type_and_bounds",
    "test_every_route_is_documented",
]

# Short, because generated requests ask for up to 16 choices of any length.
MAX_MODEL_LEN = 64
MAX_EXAMPLES = {"POST": 40, "GET": 3}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    model = make_model(tmp_path_factory.mktemp("served") / "org-tiny")
    length = ("--model.max-model-len", str(MAX_MODEL_LEN))
    with Victim.start(model, "1P1D", *SMALL, *length) as deployment:
        assert isinstance(deployment, Victim)
        pids = deployment.processes()
        yield deployment
        assert deployment.processes() == pids
        assert "Traceback" not in deployment.output


@pytest.fixture(scope="module")
def target(served: Victim) -> Target:
    return target_of(served, MAX_MODEL_LEN)


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_no_5xx_and_a_2xx_on_every_operation(
    document: dict[str, Any], target: Target, method: str, path: str
) -> None:
    operation = schemathesis.openapi.from_dict(document)[path][method]
    statuses: Counter[int] = Counter()
    for mode in GenerationMode:
        if method == "GET" and mode is not GenerationMode.POSITIVE:
            continue

        @settings(
            max_examples=MAX_EXAMPLES[method],
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def run(case: schemathesis.Case) -> None:
            response = case.call(base_url=target.root)
            case.validate_response(response, checks=CHECKS)  # a 5xx is a failure
            statuses[response.status_code] += 1

        run()
    assert statuses[200], statuses
    if method == "POST":
        assert statuses.total() > MAX_EXAMPLES[method]
        assert any(400 <= status < 500 for status in statuses), statuses
