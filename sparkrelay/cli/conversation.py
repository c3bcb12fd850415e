"""A chat as values: what was said, how the next answer is to be made, and what the slash commands change. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import Any

MAX_TEMPERATURE = 100.0
SEED_LIMIT = 2**64
DEEPEST = 15


@dataclass(frozen=True, slots=True)
class Message:
    """Something said: role is user or assistant."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class AnswerOptions:
    """How answers are made. seed None: the gateway draws one; max_tokens 0: the gateway's default."""

    system: str = ""
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    max_tokens: int = 0
    speculation: str = "auto"


@dataclass(frozen=True, slots=True)
class Conversation:
    """What was said so far, oldest first, questions and answers in turn; and how the next answer is made."""

    options: AnswerOptions = field(default_factory=AnswerOptions)
    messages: tuple[Message, ...] = ()

    def asked(self, text: str) -> Conversation:
        """With one more question."""
        return replace(self, messages=(*self.messages, Message("user", text)))

    def answered(self, text: str) -> Conversation:
        """With the answer to the last question."""
        return replace(self, messages=(*self.messages, Message("assistant", text)))

    def undone(self) -> Conversation:
        """Without the last question and its answer."""
        last = max((i for i, each in enumerate(self.messages) if each.role == "user"), default=0)
        return replace(self, messages=self.messages[:last])

    @property
    def last_question(self) -> str:
        """Empty if nothing was asked yet."""
        return next((each.content for each in reversed(self.messages) if each.role == "user"), "")

    def request(self) -> dict[str, Any]:
        """The fields of GenerateOptions that ask for the next answer."""
        options = self.options
        first = [{"role": "system", "content": options.system}] if options.system else []
        spoken = [{"role": each.role, "content": each.content} for each in self.messages]
        return {
            "messages": first + spoken,
            "temperature": options.temperature,
            "top_p": options.top_p,
            "seed": options.seed,
            "max_tokens": options.max_tokens,
            "speculation": options.speculation,
        }


class Effect(Enum):
    """What the chat has to do after a command."""

    NOTHING = auto()
    FORGET = auto()  # the session is not needed any more
    ASK_AGAIN = auto()  # the last question, whose answer was taken back
    SHOW_ROUNDS = auto()
    SHOW_SESSION = auto()
    QUIT = auto()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a command came to: the conversation from now on, a line for the user, something to do."""

    conversation: Conversation
    reply: str = ""
    effect: Effect = Effect.NOTHING


HELP_LINES = (
    ("/help", "this list"),
    ("/reset", "forget what was said; options stay"),
    ("/undo", "take back the last question and its answer"),
    ("/retry", "ask the last question again"),
    ("/system TEXT", "instructions that come first; alone: none"),
    ("/temp X", "temperature, 0 is greedy"),
    ("/top-p X", "keep the likeliest tokens up to this probability"),
    ("/seed N", "the same seed gives the same answer; alone: a new one each time"),
    ("/max N", "most tokens of an answer; alone: the gateway's default"),
    ("/spec MODE", f"off, auto or fixed:K, K from 0 to {DEEPEST}: the text stays the same"),
    ("/options", "what is set now"),
    ("/rounds", "the rounds of the last answer"),
    ("/session", "what the gateway knows of this chat"),
    ("/quit", "end; so does Ctrl-D"),
)
COMMANDS = tuple(line.partition(" ")[0] for line, _ in HELP_LINES)
_EFFECTS = {"/rounds": Effect.SHOW_ROUNDS, "/session": Effect.SHOW_SESSION, "/quit": Effect.QUIT}
_ALIASES = {"/exit": "/quit", "/bye": "/quit", "/?": "/help", "/temperature": "/temp", "/clear": "/reset"}


def is_command(line: str) -> bool:
    """Whether a line is for the chat itself; `//` begins a message with a slash."""
    return line.startswith("/") and not line.startswith("//")


def message_of(line: str) -> str:
    """What a line that is no command says to the model."""
    return line[1:] if line.startswith("//") else line


def carry_out(conversation: Conversation, line: str) -> Outcome:
    """What a slash command does. A command that is unknown or wrong changes nothing and says what to write."""
    name, _, argument = line.strip().partition(" ")
    name, argument = _ALIASES.get(name, name), argument.strip()
    if name not in COMMANDS:
        return Outcome(
            conversation, f"{name} is no command; /help lists them. // begins a message with a slash."
        )
    if name in _EFFECTS:
        return Outcome(conversation, effect=_EFFECTS[name])
    match name:
        case "/help":
            return Outcome(conversation, help_text())
        case "/options":
            return Outcome(conversation, options_text(conversation))
        case "/reset":
            fresh = replace(conversation, messages=())
            return Outcome(fresh, "Forgotten. A new conversation begins.", Effect.FORGET)
        case "/undo" | "/retry":
            return _take_back(conversation, ask_again=name == "/retry")
    return _set_option(conversation, name, argument)


def help_text() -> str:
    """The commands, one a line, and how to write longer messages."""
    lines = [f"  {command:<14} {meaning}" for command, meaning in HELP_LINES]
    return "\n".join([*lines, "  A line that ends in \\ goes on in the next. Ctrl-C stops an answer."])


def options_text(conversation: Conversation) -> str:
    """What is set, as the commands that would set it."""
    options = conversation.options
    lines = [
        f"  /system {options.system}" if options.system else "  /system        (none)",
        f"  /temp {options.temperature:g}",
        f"  /top-p {options.top_p:g}",
        "  /seed          (a new one each time)" if options.seed is None else f"  /seed {options.seed}",
        f"  /max {options.max_tokens}" if options.max_tokens else "  /max           (the gateway's default)",
        f"  /spec {options.speculation}",
    ]
    return "\n".join(lines)


def _take_back(conversation: Conversation, *, ask_again: bool) -> Outcome:
    question = conversation.last_question
    if not question:
        return Outcome(conversation, "Nothing was asked yet.")
    before = conversation.undone()
    if ask_again:
        return Outcome(before.asked(question), effect=Effect.ASK_AGAIN)
    return Outcome(before, "Taken back.")


def _set_option(conversation: Conversation, name: str, argument: str) -> Outcome:
    try:
        options = _changed(conversation.options, name, argument)
    except ValueError as error:
        return Outcome(conversation, f"{name}: {error}. Nothing is changed.")
    return Outcome(replace(conversation, options=options), _confirmation(name, argument))


def _changed(options: AnswerOptions, name: str, argument: str) -> AnswerOptions:
    """Raises ValueError that says what to write."""
    match name:
        case "/system":
            return replace(options, system=argument)
        case "/temp":
            return replace(options, temperature=_number(argument, 0.0, MAX_TEMPERATURE))
        case "/top-p":
            value = _number(argument, 0.0, 1.0)
            if value == 0.0:
                raise ValueError("write a number above 0, at most 1")
            return replace(options, top_p=value)
        case "/seed":
            return replace(options, seed=_whole(argument, SEED_LIMIT - 1) if argument else None)
        case "/max":
            return replace(options, max_tokens=_whole(argument, 2**31 - 1) if argument else 0)
        case _:
            return replace(options, speculation=_speculation(argument))


def _confirmation(name: str, argument: str) -> str:
    if argument:
        return f"{name[1:]} is {argument} from now on."
    return {"/system": "No system message.", "/seed": "A new seed each time."}.get(
        name, "Back to the default."
    )


def _number(text: str, lowest: float, highest: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not lowest <= value <= highest:
        raise ValueError(f"write a number from {lowest:g} to {highest:g}")
    return value


def _whole(text: str, highest: int) -> int:
    if not (text.isascii() and text.isdigit() and int(text) <= highest):
        raise ValueError(f"write a whole number from 0 to {highest}")
    return int(text)


def _speculation(text: str) -> str:
    name, _, depth = text.partition(":")
    is_fixed = name == "fixed" and depth.isascii() and depth.isdigit() and int(depth) <= DEEPEST
    if text not in ("off", "auto") and not is_fixed:
        raise ValueError(f"write off, auto, or fixed:K with K from 0 to {DEEPEST}")
    return text
