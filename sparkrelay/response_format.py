"""What shape a turn's text must have: one constraint, of one kind, as text. Both ends of the wire check it here."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from sparkrelay.sampling import InvalidField


class FormatKind(Enum):
    """The kinds there are; a value is the field's name in the message `ResponseFormat`."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    LARK_GRAMMAR = "lark_grammar"


MAX_BYTES = {
    FormatKind.JSON_SCHEMA: 64 * 1024,
    FormatKind.REGEX: 16 * 1024,
    FormatKind.LARK_GRAMMAR: 64 * 1024,
}


@dataclass(frozen=True, slots=True)
class ResponseFormat:
    """A constraint as it was sent; whether it means anything is found out when it is compiled."""

    kind: FormatKind
    text: str

    @property
    def field(self) -> str:
        """The request's field that holds it, for messages."""
        return f"response_format.{self.kind.value}"

    def check(self) -> None:
        """Raises InvalidField if it is empty or too large."""
        size, limit = len(self.text.encode("utf-8", "surrogatepass")), MAX_BYTES[self.kind]
        if not self.text.strip():
            raise InvalidField(self.field, "is empty; send a constraint, or no response_format for any text")
        if size > limit:
            raise InvalidField(self.field, f"has {size} bytes; send at most {limit}")
