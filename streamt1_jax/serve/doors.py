"""Who may come in: a token, and headers against other people's pages."""

from __future__ import annotations

import hmac
import ipaddress
from typing import Any, Literal
from urllib.parse import urlsplit

from aiohttp import web
from aiohttp.typedefs import Handler

COOKIE = "streamt1_token"
HEADERS = {
  "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
  "media-src blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
  "X-Frame-Options": "DENY",
  "X-Content-Type-Options": "nosniff",
  "Referrer-Policy": "no-referrer",
  "Cross-Origin-Resource-Policy": "same-origin",
  "Cross-Origin-Opener-Policy": "same-origin",
  "Cache-Control": "no-store",
}
_OPEN = ("/healthz",)


def is_loopback(host: str) -> bool:
  """Whether nobody but this machine reaches a host."""
  if host == "localhost":
    return True
  try:
    return ipaddress.ip_address(host.strip("[]")).is_loopback
  except ValueError:
    return False


def guard(token: str | None) -> Any:
  """Middleware that lets nobody in without the token, and no page of another origin.

  Args:
    token: what a client must know; None on this machine alone, where a name that others gave it is refused.
  """

  @web.middleware
  async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    _check_origin(request, anywhere=token is not None)
    if token is not None and request.path not in _OPEN:
      given = request.query.get("token")
      if given is not None and request.path == "/" and _same(given, token):
        # The address without the token may be shown and kept in a history.
        response = web.HTTPSeeOther("/")
        response.set_cookie(COOKIE, given, httponly=True, samesite="Strict", path="/")
        raise response
      if not any(_same(each, token) for each in _given(request)):
        raise web.HTTPUnauthorized(text="this server needs its token\n")
    return await handler(request)

  return middleware


async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
  """Signal of aiohttp: every answer has the headers above."""
  for name, value in HEADERS.items():
    response.headers.setdefault(name, value)


def _given(request: web.Request) -> list[str]:
  kind, _, value = request.headers.get("Authorization", "").partition(" ")
  bearer = value.strip() if kind.lower() == "bearer" else ""
  return [bearer, request.cookies.get(COOKIE, ""), request.query.get("token", "")]


def _same(given: str, token: str) -> bool:
  """In a time that does not tell how much of it is right."""
  return hmac.compare_digest(given.encode(errors="replace"), token.encode())


def _check_origin(request: web.Request, *, anywhere: bool) -> None:
  host = request.headers.get("Host", "")
  # A page elsewhere may have its own name point to this machine.
  if not anywhere and not is_loopback(_part(f"//{host}", "hostname")):
    raise web.HTTPForbidden(text="this server answers on this machine alone\n")
  origin = request.headers.get("Origin")
  if origin is not None and _part(origin, "netloc").lower() != host.lower():
    raise web.HTTPForbidden(text="pages of other origins may not use this server\n")


def _part(address: str, name: Literal["netloc", "hostname"]) -> str:
  """A part of an address; empty if it cannot be read."""
  try:
    return getattr(urlsplit(address), name) or ""
  except ValueError:
    return ""
