"""SparkRelay: lossless speculative decoding as three services.

`sparkrelay.connect("127.0.0.1:7070")` opens a client, `sparkrelay.aio.connect(...)` an asyncio one. What else lives in this
package is what two processes must have in common to agree (the wire, the noise, the protocol) or to start and run alike
(settings, telemetry, server, device). It knows no service; only `sparkrelay.cli` composes them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparkrelay.client import aio
    from sparkrelay.client.blocking import connect

__all__ = ["aio", "connect"]

# Loaded on first use: most of this package's users are services, and gRPC's client side is not free to import.
_LAZY = {"aio": ("sparkrelay.client.aio", ""), "connect": ("sparkrelay.client.blocking", "connect")}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'sparkrelay' has no attribute {name!r}")
    module_name, attribute = _LAZY[name]
    module = import_module(module_name)
    value = getattr(module, attribute) if attribute else module
    globals()[name] = value
    return value
