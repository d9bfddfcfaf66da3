"""What gets through to gradio: the page, its parts and the queue. Everything else is shut, and requests are bounded.

gradio has more routes than this demo uses: uploads and deep links, which write to the disk, files of the server, a
history of runs, an API. A list of what is open stays right when a later gradio adds another one.
"""

from __future__ import annotations

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

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        pattern = OPEN.get(scope.get("method", ""))
        if scope["type"] != "http" or pattern is None or not pattern.fullmatch(_path(scope)):
            await _refuse(scope, receive, send, 404)
            return
        length = dict(scope["headers"]).get(b"content-length", b"0")
        body = await self._body(receive) if length.isdigit() and int(length) <= self.most_bytes else None
        if body is None:
            await _refuse(scope, receive, send, 413)
            return
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

    async def _body(self, receive: Receive) -> bytes | None:
        """The body of a request, whole; None of one that is larger than it says, or than it may be."""
        parts, size, more = [], 0, True
        while more:
            message = await receive()
            part = message.get("body", b"")
            size += len(part)
            if size > self.most_bytes:
                return None
            parts.append(part)
            more = message.get("more_body", False)  # also of a visitor who has left
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
    text = {404: b"there is nothing here", 413: b"the request is too large"}[status]
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(text)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*headers, (b"connection", b"close")]})
    await send({"type": "http.response.body", "body": text})
