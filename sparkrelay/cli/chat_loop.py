"""A chat while it runs: reads questions and commands, streams answers, keeps one session warm on the gateway."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from sparkrelay.cli.chat_lines import Interrupted
from sparkrelay.cli.chat_view import ChatView
from sparkrelay.cli.conversation import Conversation, Effect, carry_out, is_command, message_of
from sparkrelay.cli.generate import how_it_went, summary
from sparkrelay.cli.output import INTERRUPTED, REFUSED, explain
from sparkrelay.cli.sessions import session_text
from sparkrelay.cli.turns import rounds_text
from sparkrelay.client.blocking import Client, Session
from sparkrelay.client.blocking_stream import GenerationStream
from sparkrelay.client.errors import NotFound, SessionBusy, SparkRelayError
from sparkrelay.client.results import Generation

# A turn that was cancelled frees its session a moment later.
BUSY_PAUSES_S = (0.02, 0.05, *(0.1,) * 50)

ReadLine = Callable[[], str | None]


class Chat:
    """One conversation: reads questions and commands until there are no more.

    by_hand  a person types: errors and Ctrl-C end an answer, not the chat
    """

    def __init__(
        self,
        client: Client,
        model: str,
        conversation: Conversation,
        view: ChatView,
        read_line: ReadLine,
        *,
        by_hand: bool,
        now: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self.conversation = conversation
        self.turns: list[Generation] = []
        self._client = client
        self._model = model
        self._view = view
        self._read_line = read_line
        self._by_hand = by_hand
        self._now = now
        self._pause = pause
        self._session: Session | None = None

    def run(self) -> int:
        """Until the end of the input or /quit. Returns the exit code."""
        interrupted_before = False
        while True:
            try:
                line = self._read_line()
            except Interrupted:
                if interrupted_before:
                    return INTERRUPTED
                interrupted_before = True
                self._view.say("\nCtrl-C again, Ctrl-D or /quit ends the chat.")
                continue
            if line is None:
                return 0
            interrupted_before = interrupted_before and not line.strip()
            code = self._take(line)
            if code is not None:
                return code

    def end(self) -> None:
        """Frees what the session holds; a gateway that is gone has nothing to free."""
        session, self._session = self._session, None
        if session is not None:
            try:
                session.end()
            except SparkRelayError as error:
                self._view.say(explain(error))

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values: everything said, and every turn as `generate --json` prints it."""
        return {
            "model": self._model,
            "messages": [asdict(message) for message in self.conversation.messages],
            "turns": [turn.to_dict() for turn in self.turns],
        }

    def _take(self, line: str) -> int | None:
        """One line of input; returns the exit code if it was the last."""
        if not line.strip():
            return None
        if not is_command(line):
            self.conversation = self.conversation.asked(message_of(line))
            return self._answer()
        outcome = carry_out(self.conversation, line)
        self.conversation = outcome.conversation
        if outcome.reply:
            self._view.say(outcome.reply)
        match outcome.effect:
            case Effect.QUIT:
                return 0
            case Effect.ASK_AGAIN:
                return self._answer()
            case Effect.FORGET:
                self.end()
            case Effect.SHOW_ROUNDS:
                self._show_rounds()
            case Effect.SHOW_SESSION:
                return self._failing(self._show_session)
        return None

    def _answer(self) -> int | None:
        """Asks what the conversation ends with. If that fails the question is taken back."""
        code = self._failing(self._stream_answer)
        if self.conversation.messages and self.conversation.messages[-1].role == "user":
            self.conversation = self.conversation.undone()
        return code

    def _failing(self, action: Callable[[], None]) -> int | None:
        """Runs something that the gateway may refuse: a person goes on, a pipe ends."""
        try:
            action()
        except SparkRelayError as error:
            self._view.say(explain(error))
            return None if self._by_hand else REFUSED
        return None

    def _stream_answer(self) -> None:
        try:
            with self._open_turn() as stream:
                self._view.started(stream.started)
                self._show_answer(stream)
        except KeyboardInterrupt:
            if not self._by_hand:
                raise
            self._view.say("[stopped]")

    def _show_answer(self, stream: GenerationStream) -> None:
        """Also of an answer that was stopped or failed, what there is stays in the conversation."""
        parts: list[str] = []
        ending = ""
        try:
            for delta in stream:
                parts.append(delta.text)
                self._view.delta(delta, self._now())
            self.turns.append(stream.result)
            ending = self._about(stream.result)
        finally:
            self._view.ended(ending)
            if any(parts):
                self.conversation = self.conversation.answered("".join(parts))

    def _about(self, turn: Generation) -> str:
        """A person can ask for ids with /rounds; what comes out of a pipe is looked up later."""
        return f"[{how_it_went(turn)}]" if self._by_hand else summary(turn)

    def _open_turn(self) -> GenerationStream:
        """Starts a turn in the session; a session that was forgotten is opened anew, one that is still busy is waited for."""
        renewed = False
        for pause_s in (*BUSY_PAUSES_S, None):
            if self._session is None:
                self._session = self._client.create_session(model=self._model)
            try:
                return self._session.generate_stream(include_rounds=True, **self.conversation.request())
            except NotFound as error:
                if renewed or error.reason != "SESSION_NOT_FOUND":
                    raise
                renewed, self._session = True, None
                self._view.say("[the gateway has forgotten the session; a new one reads the conversation]")
            except SessionBusy:
                if pause_s is None:
                    raise
                self._pause(pause_s)
        raise AssertionError("the last attempt returns or raises")

    def _show_rounds(self) -> None:
        if self.turns:
            last = self.turns[-1]
            self._view.say(f"turn {last.turn_id}, seed {last.seed}\n{rounds_text(last.rounds)}")
        else:
            self._view.say("No answer is complete yet.")

    def _show_session(self) -> None:
        if self._session is None:
            self._view.say("No session is open; the next question opens one.")
        else:
            self._view.say(session_text(self._session.info()))
