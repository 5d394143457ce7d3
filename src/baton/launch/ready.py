"""Asking the gateway whether it can serve, and which of its workers stand still."""

from __future__ import annotations

import httpx
import msgspec

from baton.config import GatewayConfig

_TIMEOUT_S = 2.0


def base_url(gateway: GatewayConfig) -> str:
    """Where a client on this machine reaches the gateway."""
    return _url("https" if gateway.tls_cert_file else "http", gateway.host, gateway.port)


def _url(scheme: str, host: str, port: int) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


class ReadyProbe:
    """`await probe()`: None when the gateway is ready, otherwise a few words why not.

    It asks the admin listener: the public one may want an API key, and only its hash is known.
    """

    def __init__(self, gateway: GatewayConfig) -> None:
        self._url = f"{_url('http', gateway.admin_host, gateway.admin_port)}/ready"

    async def __call__(self) -> str | None:
        try:
            async with httpx.AsyncClient(timeout=_TIMEOUT_S, trust_env=False) as client:
                response = await client.get(self._url)
        except httpx.ConnectError as error:
            # A refused connection is how every start begins; anything else is worth reading.
            refused = "refused" in str(error) or "attempts failed" in str(error)
            return "the gateway is starting" if refused else f"{error}"
        except httpx.HTTPError as error:
            return f"{self._url}: {error or type(error).__name__}"
        if response.status_code == 200:
            return None
        return _reason(response)


class FrozenProbe:
    """`await probe()`: workers that stand still, and the seconds for which that has been known."""

    def __init__(self, gateway: GatewayConfig) -> None:
        self._url = f"{_url('http', gateway.admin_host, gateway.admin_port)}/frozen"

    async def __call__(self) -> dict[str, float]:
        """A gateway that does not answer knows of none."""
        try:
            async with httpx.AsyncClient(timeout=_TIMEOUT_S, trust_env=False) as client:
                response = await client.get(self._url)
            return msgspec.json.decode(response.content, type=dict[str, float])
        except (httpx.HTTPError, msgspec.DecodeError):
            return {}


def _reason(response: httpx.Response) -> str:
    try:
        body = response.json()
    except ValueError:
        return f"HTTP {response.status_code}"
    for key in ("reason", "message", "error", "detail"):
        value = body.get(key) if isinstance(body, dict) else None
        if isinstance(value, dict):
            value = value.get("message")
        if isinstance(value, str):
            return value
    return f"HTTP {response.status_code}"
