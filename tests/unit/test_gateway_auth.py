"""API keys and the paths they guard."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

import pytest
from asgi_client import Exchange
from http_fixtures import toy_model, toy_model_dir

from baton.errors import ConfigError
from baton.gateway.app import create_admin_app, create_app
from baton.gateway.auth import ApiKeys
from baton.observe.metrics import HTTP_REQUESTS, Metrics
from baton.types import Request


def hashed(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def test_the_file_names_tenants(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"# ours\n\n{hashed('one')} alice  # first\n{hashed('two').upper()}\n")
    keys = ApiKeys.from_file(path)
    assert keys.tenant(b"Bearer one") == "alice"
    assert keys.tenant(b"bearer two") == hashed("two")[:16]


@pytest.mark.parametrize(
    "header",
    [None, b"", b"Bearer", b"Bearer ", b"Basic one", b"one", b"Bearer on", b"Bearer \xff",
     b"Bearer " + hashed("one").encode()],
)  # fmt: skip
def test_other_headers_are_not_accepted(header: bytes | None) -> None:
    assert ApiKeys({bytes.fromhex(hashed("one")): "alice"}).tenant(header) is None


@pytest.mark.parametrize("content", ["", "# none\n", "sk-plain-key\n", "abc123\n", "\xff"])
def test_a_wrong_file_is_refused_without_showing_it(tmp_path: Path, content: str) -> None:
    path = tmp_path / "keys"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"gateway\.api_keys_file") as caught:
        ApiKeys.from_file(path)
    assert "sk-plain-key" not in str(caught.value)
    with pytest.raises(ConfigError, match="cannot read"):
        ApiKeys.from_file(tmp_path / "nothing")


def test_everything_but_health_needs_the_key(tmp_path: Path) -> None:
    tokenizer, dispatcher = toy_model(toy_model_dir(tmp_path))
    metrics = Metrics()
    seen: list[Request] = []
    generate = dispatcher.generate
    dispatcher.generate = lambda request: (seen.append(request), generate(request))[1]  # type: ignore[method-assign]
    app = create_app(
        dispatcher=dispatcher,
        tokenizer=tokenizer,
        chat_template=None,
        model_name="toy",
        metrics=metrics,
        keys=ApiKeys({bytes.fromhex(hashed("one")): "alice", bytes.fromhex(hashed("two")): "bob"}),
    )
    body = {"model": "toy", "prompt": "Hello"}

    async def scenario() -> None:
        for method, path, raw_path in (
            ("GET", "/v1/models", None),
            ("GET", "/v1/models/toy", None),
            ("GET", "/ready", None),
            ("GET", "/openapi.json", None),
            ("GET", "/nothing", None),
            ("POST", "/v1/completions", None),
            ("POST", "/v1/chat/completions", None),
            ("POST", "/tokenize", None),
            ("POST", "/detokenize", None),
            # What decodes or normalises to the open path is not the open path.
            ("GET", "/health", b"/%68ealth"),
            ("GET", "/health", b"//health"),
            ("GET", "/health/../v1/models", None),
            ("GET", "/v1/models", b"/health/../v1/models"),
        ):
            for headers in ({}, {"authorization": "Bearer wrong"}):
                exchange = Exchange(app, path, body, method, headers, raw_path)
                await exchange.done()
                assert exchange.status == 401, (path, raw_path)
                assert exchange.json()["error"]["code"] == "invalid_api_key"
                assert exchange.headers["www-authenticate"] == "Bearer"
        assert not seen
        opened = await Exchange(app, "/health", method="GET").done()
        assert opened.status == 200
        for key in ("one", "two"):
            headers = {"authorization": f"Bearer {key}"}
            answered = await Exchange(app, "/v1/completions", body, headers=headers).done()
            assert answered.status == 200
        assert metrics.value(HTTP_REQUESTS, endpoint="/v1/completions", status="401") == 2
        assert metrics.value(HTTP_REQUESTS, endpoint="other", status="401") == 4

    asyncio.run(scenario())
    assert [request.tenant for request in seen] == ["alice", "bob"]
    assert len({request.salt for request in seen}) == 2
    assert all(len(request.salt) == 32 for request in seen)


def test_the_admin_application_shows_metrics() -> None:
    metrics = Metrics()
    metrics.add(HTTP_REQUESTS, endpoint="/x", status="200")

    async def scenario() -> None:
        app = create_admin_app(metrics=metrics)
        exchange = await Exchange(app, "/metrics", method="GET").done()
        assert exchange.status == 200
        assert b'baton_http_requests_total{endpoint="/x",status="200"} 1.0' in exchange.body
        assert (await Exchange(app, "/health", method="GET").done()).status == 200
        assert (await Exchange(app, "/nothing", method="GET").done()).status == 404

    asyncio.run(scenario())
