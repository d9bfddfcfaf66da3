"""What gets through to gradio: the page, its parts and the queue. Everything else is shut, and requests are bounded.

gradio has more routes than this demo uses: uploads and deep links, which write to the disk, files of the server, a
history of runs, an API. A list of what is open stays right when a later gradio adds another one.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

OPEN = {
    "GET": re.compile(
        r"/|/(config|theme\.css|favicon\.ico|robots\.txt|manifest\.json|login_check)/?"
        r"|/(static|assets|svelte)/(?!.*\.\.)[\w./-]+|/gradio_api/(startup-events|login_check|theme\.css|queue/data|heartbeat/\w+)"
    ),
    "POST": re.compile(r"/gradio_api/(queue/join|reset|cancel)/?"),
}
OPEN["HEAD"] = OPEN["GET"]
AT_ONCE = 4  # requests of the largest size whose bodies may be in memory together, or as many bytes of smaller ones
SECONDS = 240  # for a body to come: two photos of 10 MB at 1 Mbit/s

# The browser asks this server alone; other pages (the Hub's, around a Space) may show it in a frame.
HEADERS = {
    "content-security-policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; frame-src 'self' data: "
    "blob:; object-src 'none'; base-uri 'self'; form-action 'self'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class Door:
    """ASGI middleware.

    Args:
        app: what lies behind.
        most_bytes (`int`): of a request's body.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], most_bytes: int) -> None:
        self.app = app
        self.most_bytes = most_bytes
        self._held = 0  # bytes of all bodies that are being read or answered

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        pattern = OPEN.get(scope.get("method", ""))
        if scope["type"] != "http" or pattern is None or not pattern.fullmatch(_path(scope)):
            await _refuse(scope, receive, send, 404)
            return
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self.most_bytes:
            await _refuse(scope, receive, send, 413)
            return
        body = await self._read(receive)
        if isinstance(body, int):
            await _refuse(scope, receive, send, body)
            return
        try:
            await self._pass_on(scope, body, receive, send)
        finally:
            self._held -= len(body)

    async def _pass_on(self, scope: Message, body: bytes, receive: Receive, send: Send) -> None:
        waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replayed() -> Message:
            return waiting.pop() if waiting else await receive()

        async def labelled(message: Message) -> None:
            if message["type"] == "http.response.start":
                ours = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                kept = [pair for pair in message["headers"] if pair[0].lower().decode("latin-1") not in HEADERS]
                message = {**message, "headers": [*kept, *ours]}
            await send(message)

        await self.app(scope, replayed, labelled)

    async def _read(self, receive: Receive) -> bytes | int:
        """The body of a request, whole, which is held from now on; or the status that it is refused with."""
        parts: list[bytes] = []
        size, whole = 0, False
        try:
            async with asyncio.timeout(SECONDS):
                while not whole:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return 408  # to nobody
                    part = message.get("body", b"")
                    size, self._held = size + len(part), self._held + len(part)
                    if size > self.most_bytes:
                        return 413
                    if self._held > AT_ONCE * self.most_bytes:
                        return 503
                    parts.append(part)
                    whole = not message.get("more_body", False)
        except TimeoutError:
            return 408
        finally:
            if not whole:
                self._held -= size
        return b"".join(parts)


def _path(scope: Message) -> str:
    """The path below the one that a proxy serves this app at."""
    path, root = str(scope["path"]), str(scope.get("root_path", "")).rstrip("/")
    return path[len(root) :] if root and path.startswith(f"{root}/") else path


async def _refuse(scope: Message, receive: Receive, send: Send, status: int) -> None:
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": 1008})
        return
    text = {
        404: b"there is nothing here",
        408: b"the request did not come in time",
        413: b"the request is too large",
        503: b"too many photos are on their way; try again in a moment",
    }[status]
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(text)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*headers, (b"connection", b"close")]})
    await send({"type": "http.response.body", "body": text})
