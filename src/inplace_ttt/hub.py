"""Check whether the Hugging Face Hub can be reached, because its client would retry for a minute."""

import functools
import os
import re
import socket
import urllib.parse
import urllib.request

from inplace_ttt.environment import run_with_timeout

CONNECT_TIMEOUT = 8.0  # seconds


@functools.cache
def hub_is_reached() -> bool:
    """Return whether a connection to the Hub, or to its proxy, can be opened. False in offline mode."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or os.environ.get("TRANSFORMERS_OFFLINE") == "1":
        return False
    endpoint = urllib.parse.urlsplit(constants.ENDPOINT)
    proxy = urllib.request.getproxies().get(endpoint.scheme)
    if proxy and not urllib.request.proxy_bypass(endpoint.hostname or ""):
        endpoint = urllib.parse.urlsplit(proxy if "//" in proxy else f"//{proxy}")
    place = endpoint.hostname, endpoint.port or (80 if endpoint.scheme == "http" else 443)

    def connect() -> bool:
        socket.create_connection(place, timeout=CONNECT_TIMEOUT).close()
        return True

    return run_with_timeout(CONNECT_TIMEOUT + 2, connect) is True


def is_hub_name(name: str) -> bool:
    """Return whether a name has the form of a Hub repository, ``owner/name`` or ``name``."""
    parts = name.split("/")
    return len(parts) <= 2 and all(re.fullmatch(r"[\w-][\w.-]*", part, re.ASCII) for part in parts)
