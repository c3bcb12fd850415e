"""All links of this drafter: numbers them, and hands each what the engine has to say on it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import structlog

from drafter_service.events import (
    AllLeft,
    Command,
    ContextTaken,
    Event,
    FramesToSend,
    LeaveAll,
    LinkBroken,
    LinkDraining,
    LinkWelcomed,
    SessionGivenUp,
)
from sparkrelay.frames import DrafterFrame, Welcome
from sparkrelay.outcomes import Refusal

log = structlog.get_logger(__name__)

Post = Callable[[Command], object]
"""Hands a command to the engine."""


class LinkState(IntEnum):
    """Where a link stands; the numbers are those of drafter_service.proto (tested)."""

    CONNECTING = 1
    CONNECTED = 2
    REFUSED = 3


@dataclass(frozen=True, slots=True)
class LinkStatus:
    """For people and tools. message: what went wrong last, "" after a success."""

    address: str
    state: LinkState
    message: str = ""
    verifier_id: str = ""


class Connection(Protocol):
    """One Speculate stream with its FeedContext, as the engine's events reach it. None of these waits."""

    def send(self, frames: Sequence[DrafterFrame]) -> None:
        """Says these, in this order."""

    def welcomed(self, welcome: Welcome) -> None:
        """The verifier took us: FeedContext may be opened."""

    def context_taken(self, frame_count: int) -> None:
        """The engine has taken so many context frames: the verifier may send more."""

    def draining(self, deadline_ms: int) -> None:
        """The verifier will end."""

    def close(self, why: Refusal | None) -> None:
        """Ends the streams; cleanly, after all that is to be said, if there is nothing to blame."""


class Link(Protocol):
    """A verifier's address, dialled for ever."""

    @property
    def status(self) -> LinkStatus: ...

    @property
    def link_id(self) -> int:
        """Number of the newest connection; 0 before the first."""

    async def run(self) -> None:
        """Dials, talks, and dials again; returns only after a clean close."""


class Links:
    """See the module. Lives on the event loop; `deliver` alone may be called from another thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, post: Post) -> None:
        self._loop = loop
        self.post = post
        self._connections: dict[int, Connection] = {}
        self._last_id = 0
        self._all_left = asyncio.Event()

    def add(self, connection: Connection) -> int:
        """The number of a new connection."""
        self._last_id += 1
        self._connections[self._last_id] = connection
        return self._last_id

    def remove(self, link_id: int) -> None:
        del self._connections[link_id]

    def deliver(self, events: Iterable[Event]) -> None:
        """Takes the events of one step; for the device thread."""
        self._loop.call_soon_threadsafe(self._dispatch, events)

    async def run(self, links: Sequence[Link]) -> None:
        """Keeps all links up until `drain`."""
        async with asyncio.TaskGroup() as group:
            for link in links:
                group.create_task(link.run())

    async def drain(self) -> None:
        """Leaves every session and lets the streams end cleanly."""
        self.post(LeaveAll())
        await self._all_left.wait()
        for connection in list(self._connections.values()):
            connection.close(None)

    @property
    def draining(self) -> bool:
        return self._all_left.is_set()

    def _dispatch(self, events: Iterable[Event]) -> None:
        for event in events:
            if isinstance(event, AllLeft):
                self._all_left.set()
                continue
            connection = self._connections.get(event.link_id)
            if connection is None:
                continue  # lost meanwhile
            match event:
                case FramesToSend():
                    connection.send(event.frames)
                case ContextTaken():
                    connection.context_taken(event.frame_count)
                case LinkWelcomed():
                    connection.welcomed(event.welcome)
                case LinkDraining():
                    connection.draining(event.deadline_ms)
                case LinkBroken():
                    connection.close(Refusal(event.reason, event.message))
                case SessionGivenUp():
                    log.warning("gave up a session", session_id=event.session_id, reason=event.message)
