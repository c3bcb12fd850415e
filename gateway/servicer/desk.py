"""What all calls share: sessions, turns, verifiers, texts, and the permit that every turn needs."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import structlog

from gateway.journal import Journal, JournalStore
from gateway.sessions import Session, SessionTable
from gateway.settings import GatewaySettings
from gateway.tenants import prefix_salt
from gateway.texts import ModelText, load_text
from gateway.turns import RecentTurns
from gateway.validation import ModelLimits, check_id, invalid
from gateway.watchers import RoundBoard
from gateway.worker_pool import Description, WorkerHooks, WorkerPool, WorkerTimes
from sparkrelay.outcomes import Reason, Refusal
from sparkrelay.security import PLAINTEXT, Dialling

log = structlog.get_logger(__name__)

SWEEP_S = 1.0
MIN_TURN_ID_CHARS = 16
END_MARGIN_S = 0.5  # of a drain: kept for telling the callers of turns that were cut off


@dataclass(frozen=True, slots=True)
class Outside:
    """What is not this program's: clocks and randomness.

    clock_us      monotonic, microseconds
    wall_s        seconds since 1970
    now           local time, for chat templates
    random_bytes  n random bytes, unpredictable
    """

    clock_us: Callable[[], int]
    wall_s: Callable[[], float]
    now: Callable[[], datetime.datetime]
    random_bytes: Callable[[int], bytes]


class RunningTurn(Protocol):
    """A turn under way."""

    def end(self, refusal: Refusal) -> None:
        """Ends it from outside: whoever reads it is told this refusal."""
        ...


class FrontDesk:
    """The state of one gateway. Used from one event loop; `start` and `close` it there."""

    def __init__(
        self,
        settings: GatewaySettings,
        outside: Outside,
        on_ready: Callable[[bool], None] = lambda ready: None,
        dialling: Dialling = PLAINTEXT,
        store: JournalStore | None = None,
    ) -> None:
        self.settings = settings
        self.outside = outside
        self.sessions = SessionTable(
            settings.max_sessions, settings.session_idle_limit_ms * 1000, settings.overload_retry_ms
        )
        self.turns = RecentTurns(settings.recent_turns, settings.turn_rounds)
        self.board = RoundBoard(settings.watcher_rounds)
        self.journal = Journal(settings.resume_limit_mib * 1024 * 1024, settings.resume_keep_ms * 1000, store)
        self.draining = False
        self._on_ready = on_ready
        self._texts: dict[tuple[str, str], ModelText] = {}
        self._running: dict[str, RunningTurn] = {}
        self._turn_ended = asyncio.Event()
        self._background: set[asyncio.Task[None]] = set()
        times = WorkerTimes(
            connect_s=settings.connect_timeout_ms / 1000,
            silence_s=settings.silence_limit_ms / 1000,
            backoff_min_s=settings.backoff_min_ms / 1000,
            backoff_max_s=settings.backoff_max_ms / 1000,
        )
        hooks = WorkerHooks(
            prepare=self._load_text,
            lost=self.sessions.verifier_lost,
            changed=lambda: self._on_ready(self.pool.ready),
        )
        self.pool = WorkerPool(settings.verifier_addresses, times, hooks, dialling)

    def start(self) -> None:
        """Dials the verifiers and begins to sweep idle sessions."""
        self.pool.start()
        self.in_background(self._sweep())

    async def drain(self, seconds: float) -> None:
        """Takes no more turns, lets those under way end, and cuts off what has not ended shortly before `seconds` are over."""
        self.draining = True
        self.board.close()
        try:
            async with asyncio.timeout(max(seconds - END_MARGIN_S, 0.0)):
                await self._until_idle()
        except TimeoutError:
            self.pool.end_calls(
                Refusal(Reason.DRAINING, "The gateway is leaving and cut the turn off. Ask again.")
            )
            await self._until_idle()

    async def close(self) -> None:
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        await self.pool.close()

    @contextlib.contextmanager
    def turn_permit(self, turn_id: str, turn: RunningTurn) -> Iterator[None]:
        """Held from a turn's arrival to its end. Raises Refusal if there is none left, or the gateway leaves."""
        if self.draining:
            raise Refusal(Reason.DRAINING, "The gateway is leaving and takes no more turns. Try again.")
        if len(self._running) >= self.settings.max_turns:
            raise Refusal(
                Reason.OVERLOADED,
                f"{len(self._running)} turns are under way, the most this gateway takes. Try again a little later.",
                retry_after_ms=self.settings.overload_retry_ms,
            )
        self._running[turn_id] = turn
        try:
            yield
        finally:
            del self._running[turn_id]
            self._turn_ended.set()

    def check_new_turn_id(self, turn_id: str) -> None:
        """An id that a client chose. Raises Refusal."""
        if len(check_id("turn_id", turn_id)) < MIN_TURN_ID_CHARS:
            raise invalid(
                "turn_id",
                f"has {len(turn_id)} characters; send at least {MIN_TURN_ID_CHARS}, drawn at random",
            )
        if turn_id in self._running or self.turns.knows(turn_id):
            raise invalid("turn_id", "names a turn that is known here; resume it, or choose another")

    def cancel_turn(self, turn_id: str, why: str) -> None:
        """Ends a turn under way; one that is over stays as it is. Raises Refusal if it is unknown."""
        turn = self._running.get(turn_id)
        if turn is None:
            self.turns.get(turn_id)
            return
        turn.end(Refusal(Reason.CANCELLED, f"The turn was cancelled: {why}. Its tokens so far stay valid."))

    def new_id(self, kind: str) -> str:
        """An id that cannot be guessed."""
        return f"{kind}-{self.outside.random_bytes(12).hex()}"

    def draw_seed(self) -> int:
        """64 random bits."""
        return int.from_bytes(self.outside.random_bytes(8), "big")

    def model_name(self, asked: str) -> str:
        """The model that is meant. Raises Refusal if it is not served, or nothing was asked and several are."""
        names = list(self.pool.descriptions())
        if asked in names:
            return asked
        if not names:
            states = "; ".join(
                f"{view.address}: {view.message or view.state.name.lower()}" for view in self.pool.views
            )
            raise Refusal(
                Reason.NO_VERIFIER, f"No verifier is reachable ({states}). Start one, or try again."
            )
        if asked:
            message = f"no model {asked!r} is served here; ask for {', '.join(names)}"
            raise invalid("model", message, Reason.MODEL_NOT_FOUND)
        if len(names) > 1:
            message = f"is empty and several models are served; ask for one of {', '.join(names)}"
            raise invalid("model", message, Reason.MODEL_NOT_FOUND)
        return names[0]

    def limits_of(self, model: str) -> ModelLimits:
        """What a turn must fit, whichever of the model's verifiers runs it. Raises Refusal if it is not served."""
        hosts = self.pool.descriptions()[self.model_name(model)]
        return ModelLimits(
            context_limit=min(host.context_limit for host in hosts),
            vocab_size=min(host.vocab_size for host in hosts),
            default_stop_ids=tuple(
                sorted({token_id for host in hosts for token_id in host.default_stop_ids})
            ),
            default_max_tokens=self.settings.default_max_tokens,
            prompt_limit_chars=self.settings.prompt_limit_chars,
            has_response_format=all(host.has_response_format for host in hosts),
        )

    def text_of(self, model: str) -> ModelText:
        """How to speak to a model that is served, in text."""
        hosts = self.pool.descriptions().get(model, [])
        return self._texts[model, hosts[0].tokenizer_hash] if hosts else ModelText(reason=f"{model} is away")

    def prefix_salt(self, tenant: str) -> bytes:
        """What a verifier is told of whose request it is."""
        return prefix_salt(self.settings.prefix_salt_secret.get_secret_value(), tenant)

    def open_session(self, model: str, *, idle_limit_us: int = 0, temporary: bool = False) -> Session:
        """A new session; those that go for it are freed. Raises Refusal if there is no room."""
        session, ended = self.sessions.open(
            self.new_id("session"),
            model,
            now_us=self.outside.clock_us(),
            create_time_s=self.outside.wall_s(),
            idle_limit_us=idle_limit_us,
            temporary=temporary,
        )
        for other in ended:
            self.release(other)
        return session

    def release(self, session: Session) -> None:
        """Frees what a verifier holds of a session that has ended here."""
        if session.binding is not None:
            worker = self.pool.worker(session.binding.address)
            self.in_background(worker.end_session(session.session_id))

    async def _load_text(self, description: Description) -> None:
        key = (description.model_id, description.tokenizer_hash)
        known = self._texts.get(key)
        # What could not be read is tried again each time the verifier comes back: somebody may have put it there.
        if known is None or (known.tokenizer is None and description.tokenizer_hash):
            model, source = description.model_id, self.settings.tokenizer
            text = await asyncio.to_thread(
                load_text, model, source, description.tokenizer_hash, self.outside.now
            )
            self._texts[key] = text
            if text.chat_reason:
                log.info("text", model=model, without_text=text.reason, without_messages=text.chat_reason)

    async def _until_idle(self) -> None:
        while self._running:
            self._turn_ended.clear()
            await self._turn_ended.wait()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            for session in self.sessions.expire(self.outside.clock_us()):
                self.release(session)
            self.journal.expire(self.outside.clock_us())

    def in_background(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs it in a task that ends at the latest with the gateway."""
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
