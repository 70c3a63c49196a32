"""An empty grpc.aio service: the rate that a unary call of ours is compared with.

`python -m benchmarks.control_plane_echo` prints `{"address": "host:port"}` and serves until standard input ends.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import grpc

METHOD = "/benchmark.Echo/Echo"


async def _echo(request: bytes, context: Any) -> bytes:
    return request


async def _main() -> None:
    server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
    handlers: dict[str, Any] = {"Echo": grpc.unary_unary_rpc_method_handler(_echo)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("benchmark.Echo", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    sys.stdout.write(json.dumps({"address": f"127.0.0.1:{port}"}) + "\n")
    sys.stdout.flush()
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await server.stop(0)


if __name__ == "__main__":
    asyncio.run(_main())
