"""Where a request may go: schemes, hosts and addresses, checked on the address that is connected to."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Sequence
from urllib.parse import SplitResult, urlsplit

import msgspec

from posttrain.core import ConfigError, GradeError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
# Carriers' and clouds' own (one cloud's metadata is in it), and protocol assignments: not private, nor public.
_SHARED = (ipaddress.IPv4Network("100.64.0.0/10"), ipaddress.IPv4Network("192.0.0.0/24"))
_PORTS = {"http": 80, "https": 443}


class UrlRefused(GradeError):
    """A URL leads where requests may not go."""


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """A URL and the address that it was checked for: connect to `address`, never to the name again."""

    scheme: str
    host: str
    port: int
    address: str
    path: str  # with the query

    @property
    def url(self) -> str:
        """The URL with the address in the host's place."""
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"{self.scheme}://{host}:{self.port}{self.path}"

    @property
    def host_header(self) -> str:
        """What the server is told it is called."""
        name = f"[{self.host}]" if ":" in self.host else self.host
        return name if self.port == _PORTS.get(self.scheme) else f"{name}:{self.port}"


class UrlGuard:
    """Refuses addresses inside a network, which a URL from a configuration should not reach (SSRF).

    A name is resolved once and every address it has must be allowed; the caller connects to the address that was
    checked, so that a name which answers otherwise the next time (DNS rebinding) leads nowhere else.

    Args:
        schemes: which may be used.
        allow: addresses or networks (`127.0.0.1`, `10.1.0.0/16`) that are allowed although they are not public.
        resolve: from host and port to addresses; None: the system's resolver.

    Raises:
        ConfigError: an entry of `allow` is no address, or a scheme is not http or https.
    """

    def __init__(
        self, *, schemes: Sequence[str] = ("https",), allow: Sequence[str] = (), resolve: Resolve | None = None
    ) -> None:
        self.schemes = tuple(schemes)
        self._resolve = resolve or _system_resolve
        try:
            self._allowed: tuple[Network, ...] = tuple(ipaddress.ip_network(entry, strict=False) for entry in allow)
        except ValueError as error:
            raise ConfigError(f"allowed addresses: {error}; give addresses or networks, as 10.1.0.0/16") from error
        if not self.schemes or not set(self.schemes) <= set(_PORTS):
            raise ConfigError(f"schemes may be http and https, not {self.schemes}")

    def split(self, url: str) -> SplitResult:
        """The parts of a URL whose form is allowed.

        Raises:
            UrlRefused: another scheme, no host, a user or password, or a port that is none.
        """
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise UrlRefused(f"{url!r} is no URL: {error}") from None
        if parts.scheme not in self.schemes:
            raise UrlRefused(f"{url!r}: the scheme must be {' or '.join(self.schemes)}")
        if not parts.hostname or "%" in parts.hostname or port == 0:
            raise UrlRefused(f"{url!r} names no host and port that could be connected to")
        if parts.username is not None or parts.password is not None:
            raise UrlRefused(f"{parts.scheme}://…@{parts.hostname}: put credentials into headers, not into the URL")
        return parts

    async def check(self, url: str) -> Target:
        """Resolve a URL's host and check every address that it has.

        Raises:
            UrlRefused: the form is not allowed, the name does not resolve, or one of its addresses is not allowed.
        """
        parts = self.split(url)
        host = str(parts.hostname)
        port = parts.port or _PORTS[parts.scheme]
        try:
            addresses = await self._resolve(host, port)
        except OSError as error:
            raise UrlRefused(f"{host}: cannot be resolved: {error}") from error
        if not addresses:
            raise UrlRefused(f"{host}: has no address")
        for text in addresses:
            if not self.allows(text):
                raise UrlRefused(
                    f"{host} is {text}, which is not a public address; where that is meant, allow it: allow=({text!r},)"
                )
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        return Target(scheme=parts.scheme, host=host, port=port, address=addresses[0], path=path)

    def allows(self, text: str) -> bool:
        """Whether an address may be connected to."""
        try:
            address: Address = ipaddress.ip_address(text)
        except ValueError:
            return False
        meant = _meant(address)
        if any(meant[-1] in network for network in self._allowed if network.version == meant[-1].version):
            return True
        return all(_is_public(each) for each in meant)


def _is_public(address: Address) -> bool:
    if isinstance(address, ipaddress.IPv4Address) and any(address in network for network in _SHARED):
        return False
    special = address.is_multicast or address.is_reserved or address.is_unspecified or address.is_link_local
    return address.is_global and not special and not address.is_private and not address.is_loopback


def _meant(address: Address) -> list[Address]:
    """The addresses that a packet would reach: of an IPv6 address that stands for an IPv4 address, that one."""
    if not isinstance(address, ipaddress.IPv6Address):
        return [address]
    if address.ipv4_mapped is not None:
        return [address.ipv4_mapped]
    if address in _NAT64:
        return [ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)]
    if address.sixtofour is not None:
        return [address, address.sixtofour]
    return [address] if address.teredo is None else [address, address.teredo[1]]


async def _system_resolve(host: str, port: int) -> Sequence[str]:
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))
