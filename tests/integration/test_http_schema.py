"""The served OpenAPI document: complete, bounded, and true under generated requests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from http_fixtures import Target
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
OPERATIONS = [
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model_id}"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/health"),
    ("GET", "/ready"),
]


@pytest.fixture(scope="module")
def document(target: Target) -> dict[str, Any]:
    headers = {"authorization": f"Bearer {target.api_key}"}
    answer: dict[str, Any] = httpx.get(target.root + "/openapi.json", headers=headers).json()
    return answer


@pytest.mark.parametrize(
    ("method", "path", "mode"),
    [
        (method, path, mode)
        for method, path in OPERATIONS
        for mode in GenerationMode
        if method == "POST" or mode is GenerationMode.POSITIVE
    ],
)
def test_generated_requests(
    document: dict[str, Any], target: Target, method: str, path: str, mode: GenerationMode
) -> None:
    schema = schemathesis.openapi.from_dict(document)
    operation = schema[path][method]
    statuses: Counter[int] = Counter()
    headers = {"authorization": f"Bearer {target.api_key}"}

    def check(case: schemathesis.Case) -> None:
        response = case.call(base_url=target.root, headers=headers)
        case.validate_response(response, checks=CHECKS, headers=headers)
        statuses[response.status_code] += 1

    # Every bound of every parameter in turn, then random combinations.
    for case in schema.iter_coverage_cases(
        operation,
        generation_modes=[mode],
        generation_config=schema.config.generation_for(operation=operation),
    ):
        check(case)

    @settings(
        max_examples=30 if method == "POST" else 3,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def run(case: schemathesis.Case) -> None:
        check(case)

    run()
    if mode is GenerationMode.POSITIVE:
        assert statuses[200], statuses
    else:
        assert any(400 <= status < 500 for status in statuses), statuses


def test_every_route_is_documented(document: dict[str, Any]) -> None:
    documented = {
        (method.upper(), path) for path, item in document["paths"].items() for method in item
    }
    assert documented == set(OPERATIONS)


def test_every_parameter_has_type_and_bounds(document: dict[str, Any], target: Target) -> None:
    schemas = document["components"]["schemas"]
    seen = 0
    for name in ("CompletionRequest", "ChatRequest", "TokenizeRequest", "DetokenizeRequest"):
        for field, schema in schemas[name]["properties"].items():
            for part in alternatives(schema, schemas):
                seen += 1
                where = (name, field, part)
                kind = part["type"]
                if kind in ("integer", "number"):
                    assert {"minimum", "exclusiveMinimum"} & part.keys(), where
                    assert {"maximum", "exclusiveMaximum"} & part.keys(), where
                elif kind == "array":
                    assert "maxItems" in part, where
                elif kind == "object" and field != "stream_options":
                    assert "maxProperties" in part or "properties" in part, where
                else:
                    assert kind in ("string", "boolean", "null", "object"), where
    assert seen > 80
    lengths = schemas["ChatRequest"]["properties"]["max_tokens"]["anyOf"]
    assert lengths[0]["maximum"] == target.max_model_len - 1


def alternatives(schema: dict[str, Any], schemas: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every typed schema inside, through references, unions and lists."""
    if "$ref" in schema:
        yield from alternatives(schemas[schema["$ref"].rsplit("/", 1)[1]], schemas)
        return
    parts = [*schema.get("anyOf", []), *schema.get("oneOf", [])]
    if "type" in schema:
        yield schema
        parts = [schema["items"]] if "items" in schema else []
    else:
        assert parts, schema
    for part in parts:
        yield from alternatives(part, schemas)


def test_a_served_model_is_named(document: dict[str, Any], target: Target) -> None:
    model = document["components"]["schemas"]["ChatRequest"]["properties"]["model"]
    assert model["enum"] == [target.model]
