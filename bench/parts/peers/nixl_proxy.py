"""Joins a prefill and a decode instance of vLLM: the least that its NIXL connector needs.

    python -m parts.peers.nixl_proxy PORT PREFILL_URL DECODE_URL

A completion goes to the prefill instance for one token; its answer says where the KV lies, and
goes along with the same request to the decode instance, whose stream is passed on unchanged.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import AsyncIterator

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

TO_BE_DECODED_ELSEWHERE = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


def application(prefill_url: str, decode_url: str) -> Starlette:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    client = httpx.AsyncClient(limits=limits, timeout=None, trust_env=False)

    async def completions(request: Request) -> Response:
        body = json.loads(await request.body())
        first = {k: v for k, v in body.items() if k != "stream_options"}
        first |= {"stream": False, "max_tokens": 1, "kv_transfer_params": TO_BE_DECODED_ELSEWHERE}
        path = request.url.path
        prefilled = await client.post(prefill_url + path, json=first)
        if prefilled.status_code != 200:
            return Response(prefilled.content, prefilled.status_code)
        place = prefilled.json().get("kv_transfer_params")
        if not place:
            return Response(b'{"error": "the prefill instance offered no KV"}', 502)
        second = client.build_request(
            "POST", decode_url + path, json=body | {"kv_transfer_params": place}
        )
        answer = await client.send(second, stream=True)
        return StreamingResponse(
            _passed_on(answer), answer.status_code, media_type=answer.headers.get("content-type")
        )

    async def models(_: Request) -> Response:
        answer = await client.get(decode_url + "/v1/models")
        return Response(answer.content, answer.status_code, media_type="application/json")

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await client.aclose()

    routes = [
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/models", models),
    ]
    return Starlette(routes=routes, lifespan=lifespan)


async def _passed_on(answer: httpx.Response) -> AsyncIterator[bytes]:
    try:
        async for chunk in answer.aiter_raw():
            yield chunk
    finally:
        await answer.aclose()


if __name__ == "__main__":
    app = application(sys.argv[2], sys.argv[3])
    uvicorn.run(app, port=int(sys.argv[1]), log_level="warning")
