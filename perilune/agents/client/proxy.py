"""Which proxy an endpoint is asked through: what HTTPS_PROXY, HTTP_PROXY and NO_PROXY say."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit
from urllib.request import getproxies_environment, proxy_bypass

from perilune.errors import EngineError


def proxy_of(base_url: str) -> str | None:
    """Return the proxy for an address; None for this machine's own, and where no variable names one.

    `~/.netrc` is not read, as aiohttp's `trust_env` would: a key is sent only where it was given.

    Args:
        base_url: that is asked.

    Raises:
        EngineError: the variable holds no address of an HTTP proxy.
    """
    parts = urlsplit(base_url)
    host, proxies = parts.hostname or "", getproxies_environment()
    found = proxies.get(parts.scheme) or proxies.get("all")
    if not found or _is_this_machine(host) or proxy_bypass(parts.netloc):
        return None
    found = found if "://" in found else f"http://{found}"
    if urlsplit(found).scheme not in ("http", "https") or not urlsplit(found).hostname:
        raise EngineError(
            f"{parts.scheme.upper()}_PROXY (or ALL_PROXY) must be an address such as http://proxy:3128, as only HTTP "
            f"proxies are known; for {host} alone, NO_PROXY={host} does without"
        )
    return found


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
