"""A TCP proxy that cuts connections: at a given number of bytes from the server, or when told."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field


@dataclass
class CuttingProxy:
    """cut_after: for each connection in turn, after how many bytes from the server it is cut; then connections are left alone."""

    target: str
    cut_after: deque[int] = field(default_factory=deque)
    cut_count: int = 0
    connection_count: int = 0
    address: str = ""
    _open: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = field(default_factory=set)

    def cut_all(self) -> None:
        """Cuts what is open now, on both sides."""
        for pair in tuple(self._open):
            for writer in pair:
                writer.transport.abort()
            self.cut_count += 1

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = self.target.rpartition(":")
        self.connection_count += 1
        try:
            server_reader, server_writer = await asyncio.open_connection(host, int(port))
        except OSError:
            writer.transport.abort()
            return
        limit = self.cut_after.popleft() if self.cut_after else None
        pair = (writer, server_writer)
        self._open.add(pair)
        up = asyncio.create_task(self._copy(reader, server_writer, None))
        try:
            if await self._copy(server_reader, writer, limit):
                self.cut_count += 1
        finally:
            self._open.discard(pair)
            up.cancel()
            for each in pair:
                each.transport.abort()

    async def _copy(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, limit: int | None
    ) -> bool:
        """True if it was cut at the limit."""
        with suppress(ConnectionError):
            while data := await source.read(4096):
                if limit is not None and len(data) >= limit:
                    sink.write(data[:limit])
                    await sink.drain()
                    return True
                limit = None if limit is None else limit - len(data)
                sink.write(data)
                await sink.drain()
        return False


@asynccontextmanager
async def cutting_proxy(target: str, cut_after: Iterable[int] = ()) -> AsyncGenerator[CuttingProxy]:
    """A proxy in front of `target` (host:port)."""
    proxy = CuttingProxy(target, deque(cut_after))
    server = await asyncio.start_server(proxy.handle, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()[:2]
    proxy.address = f"{host}:{port}"
    try:
        yield proxy
    finally:
        server.close()
        proxy.cut_all()
        await server.wait_closed()
