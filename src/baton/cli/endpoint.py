"""The server that `chat` and `bench` talk to: its address, a key, and which model it has."""

from __future__ import annotations

from pathlib import Path

import httpx
import msgspec

from baton.cli.parser import Parser
from baton.errors import BatonError, ConfigError

DEFAULT_URL = "http://127.0.0.1:8000"


def add_endpoint_flags(parser: Parser) -> None:
    parser.add_argument(
        "--url", default=DEFAULT_URL, help=f"Server, with or without /v1. [{DEFAULT_URL}]"
    )
    parser.add_argument("--model", metavar="NAME", help="Model; by default the server's first.")
    parser.add_argument("--api-key", metavar="KEY", help="API key, or @FILE that holds it.")


class Endpoint(msgspec.Struct, frozen=True):
    """base_url ends in /v1."""

    base_url: str
    model: str
    api_key: str | None = None

    @property
    def headers(self) -> dict[str, str]:
        """Identity encoding: a compressed stream would arrive in lumps."""
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        return headers


def connect(url: str, model: str | None, api_key: str | None) -> Endpoint:
    """Check that a server answers, and choose its first model if none is named.

    Raises:
        ConfigError: the URL or key file cannot be used.
        BatonError: no server there, it refuses, or it has no model.
    """
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"--url {url!r} must begin with http:// or https://")
    base = url.rstrip("/").removesuffix("/v1") + "/v1"
    if api_key is not None and api_key.startswith("@"):
        try:
            api_key = Path(api_key[1:]).read_text(encoding="utf-8").strip()
        except OSError as error:
            raise ConfigError(f"--api-key: cannot read {api_key[1:]}: {error.strerror}") from None
    endpoint = Endpoint(base, model or "", api_key)
    try:
        response = httpx.get(
            f"{base}/models", headers=endpoint.headers, timeout=30, trust_env=False
        )
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise BatonError(
            f"no server answers at {base} ({error}): start one with `baton serve --model DIR`, "
            "or give --url"
        ) from None
    if response.status_code in (401, 403):
        raise BatonError(f"{base} wants an API key: give --api-key")
    if model is not None:
        return endpoint
    try:
        response.raise_for_status()
        models = msgspec.json.decode(response.content, type=_Models).data
    except (httpx.HTTPError, msgspec.MsgspecError) as error:
        raise BatonError(f"{base}/models does not list models ({error}): give --model") from None
    if not models:
        raise BatonError(f"{base} serves no model")
    return msgspec.structs.replace(endpoint, model=models[0].id)


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]
