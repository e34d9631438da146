"""Addresses as they may be shown: they can hold passwords."""

from __future__ import annotations

import re

# A password may hold slashes and even @: databases take it as it is.
_IN_FRONT = re.compile(r"//(?:[^\s/@:]*:\S*|[^\s/]*)@")
_SECRET = "password|passwd|pwd|secret|token|key|auth|signature"
_IN_QUERY = re.compile(rf"([?&;][^=&;\s]*(?:{_SECRET})[^=&;\s]*=)[^&;\s]*", re.IGNORECASE)


def public_uri(uri: str) -> str:
    """The address without user and password before the host, and without the values of a query that look secret."""
    return _IN_QUERY.sub(r"\1***", _IN_FRONT.sub("//", uri))
