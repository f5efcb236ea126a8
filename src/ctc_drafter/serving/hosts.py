"""Who may be asked for: a server that only this machine reaches must not answer to another site's name."""

from __future__ import annotations

import ipaddress

from starlette.types import ASGIApp, Receive, Scope, Send

from .errors import ApiError


class LocalNames:
    """Middleware that refuses requests whose Host is neither `localhost` nor an address.

    A web page may let its own name point to 127.0.0.1 (DNS rebinding); to the browser the server is then that page's
    own, and its answers can be read. The Host header still carries the page's name.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not is_local_name(dict(scope["headers"]).get(b"host", b"").decode("latin-1")):
            message = "This server answers to localhost and to addresses only; see --host and --api-key-env."
            await ApiError(403, message, code="unknown_host").response()(scope, receive, send)
            return
        await self._app(scope, receive, send)


def is_local_name(host: str) -> bool:
    """Whether a Host header names `localhost` or an IP address, with or without a port."""
    if host.startswith("["):
        name, closed, _ = host[1:].partition("]")
        if not closed:
            return False
    else:
        name = host.partition(":")[0]
    if name.lower() == "localhost":
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
