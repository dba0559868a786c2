"""Closed-loop HTTP clients, which send the next request after the response to the last one.

    python -m benchmarks.load 127.0.0.1:8000 --clients 8 --seconds 10 < BODIES

Reads bodies of POST /recommend, one per line, and writes one line of JSON per request: start and end (seconds of the
monotonic clock), status (0 if the connection broke) and checkpoint. It runs in a separate process with few imports, to
take little CPU time from the service.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import sys
import time
from collections.abc import Iterator


async def client(host: str, port: int, requests: Iterator[bytes], may_go_on: asyncio.Event) -> None:
    """Send requests until none are left or the event is cleared."""
    reader = writer = None
    for request in requests:
        if not may_go_on.is_set():
            break
        started = time.monotonic()
        status, body = 0, b""
        try:
            if writer is None or writer.is_closing():
                reader, writer = await asyncio.open_connection(host, port)
            assert reader is not None
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            status = int(head[9:12])
            length = int(head.lower().partition(b"content-length:")[2].partition(b"\r")[0])
            body = await reader.readexactly(length)
        except (OSError, ValueError, asyncio.IncompleteReadError):
            status = 0
            if writer is not None:
                writer.close()
            await asyncio.sleep(0.01)
        checkpoint = body.rpartition(b'"checkpoint":"')[2].partition(b'"')[0].decode() if status == 200 else ""
        sys.stdout.write(json.dumps([started, time.monotonic(), status, checkpoint]) + "\n")


async def main() -> None:
    options = argparse.ArgumentParser(prog="python -m benchmarks.load")
    options.add_argument("address")
    options.add_argument("--clients", type=int, required=True)
    options.add_argument("--seconds", type=float, default=float("inf"))
    options.add_argument("--requests", type=int)
    chosen = options.parse_args()
    host, _, port = chosen.address.rpartition(":")
    sent = [
        b"POST /recommend HTTP/1.1\r\nHost: benchmark\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        for body in sys.stdin.buffer.read().splitlines()
    ]
    requests = itertools.islice(itertools.cycle(sent), chosen.requests)
    may_go_on = asyncio.Event()
    may_go_on.set()
    if chosen.seconds < float("inf"):
        asyncio.get_running_loop().call_later(chosen.seconds, may_go_on.clear)
    await asyncio.gather(*(client(host, int(port), requests, may_go_on) for _ in range(chosen.clients)))


if __name__ == "__main__":
    asyncio.run(main())
