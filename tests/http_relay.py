"""A script: passes on what comes to Unix sockets in a folder to the gateway's ports on loopback.

http_relay.py FOLDER        public.sock to port 8000, admin.sock to port 8001
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from asyncio import StreamReader, StreamWriter
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any


async def copy(reader: StreamReader, writer: StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    writer.close()


def accept(port: int) -> Callable[[StreamReader, StreamWriter], Coroutine[Any, Any, None]]:
    async def accepted(reader: StreamReader, writer: StreamWriter) -> None:
        try:
            answers, asks = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            writer.transport.abort()
            return
        await asyncio.gather(copy(reader, asks), copy(answers, writer))

    return accepted


async def main(folder: Path) -> None:
    for name, port in (("public", 8000), ("admin", 8001)):
        await asyncio.start_unix_server(accept(port), folder / f"{name}.sock")
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
