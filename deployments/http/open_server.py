"""What a server without API keys serves: programs on this machine only.

Not other machines, not a proxy that passes their requests on, and not web pages, for which any browser on this machine
would send requests. Looks at plain data; knows no tenants.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from ipaddress import IPv6Address, ip_address
from urllib.parse import urlsplit

from deployments.errors import CrossOriginError, RemoteWithoutKeysError, UnsupportedMediaTypeError

# What proxies add to the requests that they pass on; of the first kind whatever follows.
FORWARDED_PREFIX = "x-forwarded-"
FORWARDED = frozenset(
    {
        "cf-connecting-ip",
        "forwarded",
        "true-client-ip",
        "via",
        "x-client-ip",
        "x-cluster-client-ip",
        "x-envoy-external-address",
        "x-original-forwarded-for",
        "x-real-ip",
    }
)
REMEDY = (
    "no API keys are configured, so only clients on this machine are served; to configure keys, see tenants_file in "
    "docs/http_api.md"
)


def check_is_local(
    headers: Iterable[tuple[str, str]],
    client_host: str | None,
    *,
    sees_clients: bool = True,
    allowed_origins: Collection[str] = (),
) -> None:
    """Raises the RequestError that rejects a request which is not local.

    headers: with names in small letters.
    client_host: the address that the request came from; None if that is no network address.
    sees_clients: whether that address is its client's.
    allowed_origins: of web pages that may ask although they come from elsewhere, by name.
    """
    if not sees_clients:
        raise RemoteWithoutKeysError(f"HAProxy hides the client's address, and {REMEDY}")
    if client_host is not None and not is_loopback(client_host):
        raise RemoteWithoutKeysError(REMEDY)
    by_name: dict[str, str] = {}
    for name, value in headers:
        if name in FORWARDED or name.startswith(FORWARDED_PREFIX):
            raise RemoteWithoutKeysError(f"the request came through a proxy (it has the header {name}), and {REMEDY}")
        if name == "host" and not _is_loopback_authority(f"//{value}"):
            raise RemoteWithoutKeysError(f"the request is for another host than localhost (header host), and {REMEDY}")
        by_name[name] = value
    if by_name.get("origin") not in allowed_origins:
        _check_origin(by_name)
    _check_content_type(by_name)


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own."""
    try:
        address = ip_address(host)
    except ValueError:
        return host.lower() == "localhost"
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return address.is_loopback


def _is_loopback_authority(url: str) -> bool:
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018  raises if it is no number
        return parts.hostname is not None and parts.username is None and is_loopback(parts.hostname)
    except ValueError:
        return False


def _check_origin(headers: Mapping[str, str]) -> None:
    """Browsers say which page a request comes from, and pages cannot change that."""
    origin = headers.get("origin")
    is_foreign = headers.get("sec-fetch-site") == "cross-site" if origin is None else not _is_loopback_authority(origin)
    if is_foreign:
        raise CrossOriginError(
            "web pages of other hosts are only served with API keys; configure keys, and send one, or name the page's origin "
            "in cors_allowed_origins"
        )


def _check_content_type(headers: Mapping[str, str]) -> None:
    """JSON is what a browser asks for permission to send, which it does not get."""
    if headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers:
        return
    media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise UnsupportedMediaTypeError("send the body with 'Content-Type: application/json'")
