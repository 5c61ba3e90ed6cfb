"""What stands before the server: who may ask, from where, how much, and what the browser is told to refuse."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

__all__ = ["Guard", "local_hosts"]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


def local_hosts(port: int) -> tuple[str, ...]:
    """Return the names under which a browser on this machine reaches a port.

    Parameters
    ----------
    port : of the server

    Examples
    --------
    >>> local_hosts(8765)
    ('127.0.0.1:8765', 'localhost:8765', '[::1]:8765')
    """
    return tuple(f"{name}:{port}" for name in ("127.0.0.1", "localhost", "[::1]"))


class Guard:
    """Refuse requests under a foreign name (DNS rebinding), from a foreign page, larger or slower than allowed.

    Parameters
    ----------
    app : behind the guard
    hosts : names with port that requests may come under
    limit : bytes of a body
    headers : added to every answer
    patience : seconds that a body may take to arrive
    """

    def __init__(
        self,
        app: App,
        hosts: Iterable[str],
        *,
        limit: int,
        headers: Iterable[tuple[str, str]],
        patience: float = 20.0,
    ) -> None:
        self._app, self._hosts, self._limit = app, frozenset(host.lower() for host in hosts), limit
        self._patience = patience
        self._too_large = 413, f"the request is larger than {limit} bytes; send fewer cells at once"
        self._headers = [(name.lower().encode(), value.encode()) for name, value in headers]

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        found = {name: value.decode("latin-1") for name, value in headers}
        if [name for name, _ in headers].count(b"host") != 1 or found[b"host"].lower() not in self._hosts:
            return 403, f"Host: this server answers to {', '.join(sorted(self._hosts))} only"
        if b"origin" in found:
            scheme, _, host = found[b"origin"].lower().partition("://")
            if host not in self._hosts or scheme not in {"http", "https"}:
                return 403, "Origin: another page asks; open the annotation page itself"
        # A bare page load may come from a link anywhere; it holds no data.
        asks = scope["method"] not in {"GET", "HEAD"} or scope["path"].startswith("/api/")
        if asks and found.get(b"sec-fetch-site", "none") not in {"same-origin", "none"}:
            return 403, "Sec-Fetch-Site: another page asks; open the annotation page itself"
        length = found.get(b"content-length", "0")
        if not length.isdigit() or int(length) > self._limit:
            return self._too_large
        if scope["method"] not in {"GET", "HEAD"}:
            kind = found.get(b"content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                return 415, "Content-Type: send application/json"
        return None

    async def _body(self, receive: Receive) -> bytes | None:
        """Return the body, or as much of it as shows that it is too large; None when the other side is gone."""
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self._limit or not message.get("more_body", False):
                return bytes(body)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return

        async def decorated(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *self._headers]
            await send(message)

        refusal, body = self._refusal(scope), b""
        if not refusal:
            try:
                async with asyncio.timeout(self._patience):
                    found = await self._body(receive)
            except TimeoutError:
                refusal = 408, f"the request did not arrive within {self._patience:g} s; send it again"
            else:
                if found is None:
                    return
                body = found
                refusal = self._too_large if len(body) > self._limit else None
        if refusal:
            status, text = refusal
            answer = json.dumps({"error": text}).encode()
            # What is still on its way is not waited for.
            kind = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(answer)).encode()),
                (b"connection", b"close"),
            ]
            await decorated({"type": "http.response.start", "status": status, "headers": kind})
            await send({"type": "http.response.body", "body": answer})
            return
        given = False

        async def again() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, again, decorated)
