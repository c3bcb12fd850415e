"""Whose request it is, and what that means for shared state: only equal salts share what was read of equal beginnings. Pure."""

from __future__ import annotations

import hashlib
import hmac

_PURPOSE = b"sparkrelay prefix salt 1\0"
_SALT_BYTES = 16


def prefix_salt(secret: str, tenant: str) -> bytes:
    """A tenant's salt: clients never see it and cannot guess it, and gateways with the same secret agree on it.

    Without a tenant and without a secret there is nobody to keep apart: everybody shares, also with other gateways like this.
    """
    if not secret and not tenant:
        return b""
    return hmac.digest(secret.encode(), _PURPOSE + tenant.encode(), hashlib.sha256)[:_SALT_BYTES]
