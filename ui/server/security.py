"""Who may come in: addresses, hosts, origins and the token. Read docs/serving.md for the reasons.

Three attacks shape this file. A page of another site opens our socket from a visitor's browser: browsers say where a
page is from, so the origin is compared. A site points its own name at 127.0.0.1 (DNS rebinding): its pages then count
as ours, so a server on the loopback interface answers only to loopback names. And a stranger on the network: everything
but /health asks for the token.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections import OrderedDict
from http.cookies import CookieError, SimpleCookie
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlencode, urlsplit

from .pacing import Bucket
from .settings import Settings

if TYPE_CHECKING:
    from starlette.responses import Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

TOKEN_COOKIE = "millstream_token"
LEAST_TOKEN = 8
REMEMBERED_ADDRESSES = 4096
GUESSES = 60  # wrong tokens that one address may try at once, and the same again every minute
LOGIN = b"""<!doctype html><meta name=viewport content="width=device-width"><title>millstream</title>
<body style="font:16px system-ui;max-width:24em;margin:20vh auto;padding:0 1em">
<form action="./" method=post><p>WHY</p>
<input name=token type=password autofocus autocomplete=current-password aria-label=Token required
style="font:inherit;width:100%"></form>"""
TOO_OFTEN = b"Too many wrong tokens came from your address. Try again in a minute."
LOGIN_BYTES = 2048  # of a form that holds nothing but the token


def is_loopback(host: str) -> bool:
    """Is `host` this machine's own address, which nobody else can reach?"""
    if host.rstrip(".").lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_exposure(host: str, token: str | None) -> None:
    """Refuse to listen to the network without a token that is worth something.

    Raises:
        ValueError: no token, or one that can be guessed.
    """
    if token is not None and len(token) < LEAST_TOKEN:
        raise ValueError(
            f"the token has {len(token)} characters, at least {LEAST_TOKEN} are wanted; omit it for a new one"
        )
    if token is not None and not token.isascii():
        raise ValueError("the token must be plain ASCII, since it travels in an address")
    if token is None and not is_loopback(host):
        raise ValueError(
            f"--host {host} lets others reach this server, so it needs --token; without a value a new one is printed"
        )


def same(secret: str, given: str | None) -> bool:
    """Compare in constant time."""
    return given is not None and hmac.compare_digest(secret.encode(), given.encode(errors="replace"))


class Gate:
    """ASGI middleware around the whole app: foreign hosts, foreign origins and strangers get no further.

    The token comes as `?token=`, from the form that a stranger is shown, as the cookie that either of them sets, or in
    an Authorization header.
    A socket may also send it in its first message, so sockets pass here and are asked at their own door.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app, self.settings = app, settings
        self._guesses = Doorman(GUESSES)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        from starlette.responses import PlainTextResponse

        headers = headers_of(scope)
        if not host_allowed(headers, self.settings):
            answer: Response = PlainTextResponse(f"this server is not {headers.get('host', '')!r}\n", 421)
        elif scope["method"] not in ("GET", "HEAD", "OPTIONS") and not origin_allowed(headers, self.settings):
            answer = PlainTextResponse("this page may not send anything here\n", 403)
        elif self.settings.token and scope["method"] == "POST" and scope["path"] == "/":
            answer = self._login(scope, await _form_token(receive))
        elif scope["path"] != "/health" and (why := self._stranger(scope)):
            answer = _login_page(why)
        elif self.settings.token and "token" in query_of(scope) and scope["path"] == "/":
            # so that the token doesn't stay in the address bar, the history and the Referer header
            rest = urlencode({name: value for name, value in query_of(scope).items() if name != "token"})
            answer = self._welcomed(scope, "./" + (f"?{rest}" if rest else ""))  # a proxy may serve us below a path
        else:
            return await self.app(scope, receive, self._framed(send))
        await answer(scope, receive, send)

    def _login(self, scope: Scope, given: str) -> Response:
        """The answer to the form."""
        address = scope["client"][0] if scope.get("client") else ""
        if self._guesses.blocks(address):
            return _login_page(TOO_OFTEN)
        if self.settings.token is not None and same(self.settings.token, given):
            return self._welcomed(scope, "./")
        self._guesses.admits(address)
        return _login_page(b"That is not the token. The server printed it when it started.")

    def _welcomed(self, scope: Scope, where: str) -> Response:
        """On to the page, with the token in a cookie that no script and no other site can use."""
        from starlette.responses import RedirectResponse

        answer = RedirectResponse(where, 303, {"cache-control": "no-store", "referrer-policy": "no-referrer"})
        secure = scope["scheme"] == "https"
        answer.set_cookie(TOKEN_COOKIE, self.settings.token or "", httponly=True, samesite="strict", secure=secure)
        return answer

    def _stranger(self, scope: Scope) -> bytes:
        """Why this request goes no further; nothing if it brings the token. Who guesses too often isn't listened to."""
        given = tokens_of(scope)
        address = scope["client"][0] if scope.get("client") else ""
        if self.settings.token is None:
            return b""
        if given and self._guesses.blocks(address):
            return TOO_OFTEN
        if token_given(scope, self.settings):
            return b""
        if given:
            self._guesses.admits(address)
        return b"This server asks for the token that it printed when it started."

    def _framed(self, send: Send) -> Send:
        """Let no page of another site show ours in a frame, where it could steal clicks."""
        policy = " ".join(("frame-ancestors 'self'", *self.settings.origins)).encode()
        extra = [(b"content-security-policy", policy), (b"x-content-type-options", b"nosniff")]

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *extra]}
            await send(message)

        return sending


def _login_page(why: bytes) -> Response:
    from starlette.responses import Response

    headers = {"cache-control": "no-store", "content-security-policy": "frame-ancestors 'none'"}
    return Response(LOGIN.replace(b"WHY", why), 401, headers, "text/html")


async def _form_token(receive: Receive) -> str:
    """The token in the body of a form; nothing of a body that is longer than such a form."""
    body, more = b"", True
    while more and len(body) <= LOGIN_BYTES:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    if len(body) > LOGIN_BYTES:
        return ""
    return parse_qs(body.decode("latin-1")).get("token", [""])[-1]


def headers_of(scope: Scope) -> dict[str, str]:
    """Header names in lower case; a repeated header counts once, with its last value."""
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}


def query_of(scope: Scope) -> dict[str, str]:
    return {name: values[-1] for name, values in parse_qs(scope["query_string"].decode("latin-1")).items()}


def cookies_of(headers: dict[str, str]) -> dict[str, str]:
    try:
        return {name: morsel.value for name, morsel in SimpleCookie(headers.get("cookie", "")).items()}
    except CookieError:
        return {}


def host_allowed(headers: dict[str, str], settings: Settings) -> bool:
    """On the loopback interface only its own names are us, and hosts that the settings name."""
    if not is_loopback(settings.host):
        return True
    host = headers.get("host", "")
    return is_loopback(_name_of(host)) or any(urlsplit(origin).netloc == host for origin in settings.origins)


def origin_allowed(headers: dict[str, str], settings: Settings) -> bool:
    """Programs send no origin, and could send any. A browser's must be the host it speaks to, or in the settings."""
    origin = headers.get("origin")
    if origin is None or origin in settings.origins:
        return True
    host = headers.get("host", "").lower()
    return host != "" and origin.lower() in (f"http://{host}", f"https://{host}")


def token_given(scope: Scope, settings: Settings) -> bool:
    """Does the request itself carry the token, if one is asked for?"""
    if settings.token is None:
        return True
    return any(same(settings.token, value) for value in tokens_of(scope))


def tokens_of(scope: Scope) -> list[str]:
    """What a request gives as the token: in its address, its cookie, its Authorization header."""
    headers = headers_of(scope)
    bearer = headers.get("authorization", "").removeprefix("Bearer ")
    given = (query_of(scope).get("token"), cookies_of(headers).get(TOKEN_COOKIE), bearer)
    return [token for token in given if token]


def _name_of(host: str) -> str:
    """The name in a Host header, without the port."""
    return host.partition("]")[0] if host.startswith("[") else host.partition(":")[0]


class Doorman:
    """Limits how often one address may do something. Remembers so many addresses and forgets the oldest.

    Args:
        times: at once, and the same again every minute.
    """

    def __init__(self, times: int) -> None:
        self._times = times
        self._buckets: OrderedDict[str, Bucket] = OrderedDict()

    def admits(self, address: str) -> bool:
        """Once more? Then it counts."""
        address = network_of(address)
        bucket = self._buckets.pop(address, None) or Bucket(self._times / 60, self._times)
        self._buckets[address] = bucket
        if len(self._buckets) > REMEMBERED_ADDRESSES:
            self._buckets.popitem(last=False)
        return bucket.take()

    def blocks(self, address: str) -> bool:
        """Would it be refused now?"""
        bucket = self._buckets.get(network_of(address))
        return bucket is not None and bucket.empty


def network_of(address: str) -> str:
    """An IPv6 household has 2^64 addresses, so all of them count as one."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if parsed.version == 4 or parsed.ipv4_mapped is not None:
        return address
    return str(ipaddress.IPv6Network((int(parsed), 64), strict=False))
