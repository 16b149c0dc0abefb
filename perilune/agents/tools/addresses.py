"""Which addresses and hosts of the network a tool may speak to."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any
from urllib.parse import SplitResult, urlsplit

from perilune.agents.tools.base import ToolError

# A cloud's service for its machines, at an address that looks public.
_METADATA = frozenset((IPv4Address("168.63.129.16"),))
# IPv6 addresses of these networks stand for the IPv4 address in their last 32 bits.
_TRANSLATED = (IPv6Network("64:ff9b::/96"), IPv6Network("::/96"), IPv6Network("::ffff:0:0:0/96"))


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkRules:
    """What may be reached. Loopback, private, link-local, multicast, reserved and metadata addresses may not."""

    allow_hosts: tuple[str, ...] | None = None
    """Patterns of host names, such as `*.example.org`; None: any."""
    allow_networks: tuple[str, ...] = ()
    """Networks that may be reached in spite of that, such as `127.0.0.0/8` for a server of one's own."""

    def __post_init__(self) -> None:
        for network in self.allow_networks:
            ip_network(network)

    def check_url(self, url: str) -> SplitResult:
        """Return the parts of a URL that may be asked for, as far as its text tells.

        Raises:
            ToolError: another scheme, no host, a password in it, or a host that is not allowed.
        """
        try:
            parts = urlsplit(url)
            host, _ = parts.hostname, parts.port
        except ValueError as error:
            raise ToolError(f"{url[:200]!r} is no URL: {error}") from error
        if any(character.isspace() or not character.isprintable() or character == "\\" for character in url):
            raise ToolError(f"{url[:200]!r} is no URL: it has spaces, control characters or backslashes")
        if parts.scheme not in ("http", "https"):
            raise ToolError(f"{url[:200]!r}: only http and https are fetched")
        if not host:
            raise ToolError(f"{url[:200]!r} names no host")
        if parts.username is not None or parts.password is not None:
            raise ToolError(f"{host}: a user or a password in a URL is not sent")
        name = host.rstrip(".").lower()
        if self.allow_hosts is not None and not any(fnmatchcase(name, known.lower()) for known in self.allow_hosts):
            raise ToolError(f"{name} is not among the hosts that may be reached: {', '.join(self.allow_hosts)}")
        try:
            address = ip_address(name)
        except ValueError:
            # 127.1 and 2130706433 are addresses to some programs, aiohttp among them, which would not look them up.
            if ":" in name or name.replace(".", "").isdigit():
                raise ToolError(f"{name} is no address in its usual form") from None
            return parts
        self.check_address(address, name)  # no name server is asked for these, so nobody else would
        return parts

    def check_address(self, address: IPv4Address | IPv6Address, host: str) -> None:
        """Pass an address that a connection may go to.

        Raises:
            ToolError: it may not.
        """
        if any(address in ip_network(network) for network in self.allow_networks):
            return
        for one in (address, *_embedded(address)):
            if not one.is_global or one.is_multicast or one.is_reserved or one in _METADATA:
                raise ToolError(f"{host} is at {address}, which is no public address; such are not fetched")


class CheckedResolver:
    """Looks names up for aiohttp, which connects to no address but those it gets here: checked once, and pinned."""

    def __init__(self, rules: NetworkRules, lookup: Any) -> None:
        """Check what `lookup`, a resolver of aiohttp's, finds."""
        self.rules, self.lookup = rules, lookup

    async def resolve(self, host: str, port: int = 0, family: int = socket.AF_INET) -> list[Any]:
        """Return the addresses of a host; one that may not be reached is enough to refuse all."""
        found = await self.lookup.resolve(host, port, socket.AddressFamily(family))
        for entry in found:
            self.rules.check_address(ip_address(entry["host"].partition("%")[0]), host)
        return found

    async def close(self) -> None:
        """Close what looks up."""
        await self.lookup.close()


def _embedded(address: IPv4Address | IPv6Address) -> Sequence[IPv4Address]:
    """Return the IPv4 addresses that a connection to an IPv6 address would end at."""
    if isinstance(address, IPv4Address):
        return ()
    found = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
    if any(address in network for network in _TRANSLATED):
        found.append(IPv4Address(int(address) & 0xFFFF_FFFF))
    return [one for one in found if one is not None]
