"""Where chat templates run: jinja2's sandbox, with an end to how long and how large.

A template is a program that comes with a model. The sandbox keeps it away from Python; what is counted here keeps it
from running for ever and from writing without end, by mistake or because a conversation makes it: every turn of a loop
and every call of a macro is a step. What single functions may build (the width of a format, say) is not counted: who
installs a model trusts it that far.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
from jinja2.visitor import NodeTransformer

MAX_STEPS = 200_000  # about half a second; a conversation of 2,048 messages has a hundred for each
MAX_RENDERED_CHARS = 8 * 1024 * 1024
MAX_SOURCE_CHARS = 1024 * 1024
MAX_EXPONENT = 64

_steps_left: ContextVar[list[int]] = ContextVar("steps_left")


class TooMuch(Exception):
    """A template went on for too long, or wrote too much."""


class ChatEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """What templates are written for, as far as syntax goes: trimmed blocks, loop controls, the `generation` tag."""

    intercepted_binops = frozenset(("*", "**"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _GenerationTag]
        )

    def compiled(self, source: str) -> jinja2.Template:
        """Raises ValueError, with the line where there is one."""
        if len(source) > MAX_SOURCE_CHARS:
            raise ValueError(
                f"its chat template has {len(source)} characters; at most {MAX_SOURCE_CHARS} are read"
            )
        try:
            return self.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            message = f"its chat template does not compile: line {error.lineno}: {error.message}"
            raise ValueError(message) from error
        except Exception as error:  # Python's own compiler and stack have limits, too
            raise ValueError(f"its chat template does not compile: {error}") from error

    def rendered(self, template: jinja2.Template, values: Mapping[str, Any]) -> str:
        """The text. Raises TooMuch, or whatever the template raises."""
        _steps_left.set([MAX_STEPS])
        parts, size = [], 0
        for part in template.generate(values):
            size += len(part)
            if size > MAX_RENDERED_CHARS:
                raise TooMuch(f"it wrote more than {MAX_RENDERED_CHARS} characters")
            parts.append(part)
        return "".join(parts)

    def tick(self) -> None:
        """One step; compiled into every loop and macro."""
        left = _steps_left.get()
        left[0] -= 1
        if left[0] < 0:
            raise TooMuch(f"it took more than {MAX_STEPS} steps")

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        """Products and powers: the two operators that make much of little."""
        if operator == "**" and isinstance(right, int) and abs(right) > MAX_EXPONENT:
            raise TooMuch(f"an exponent is {right}; at most {MAX_EXPONENT}")
        for many, count in ((left, right), (right, left)):
            if (
                isinstance(many, str | list | tuple)
                and isinstance(count, int)
                and len(many) * count > MAX_RENDERED_CHARS
            ):
                raise TooMuch(f"a product has {len(many) * count} elements; at most {MAX_RENDERED_CHARS}")
        return super().call_binop(context, operator, left, right)

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        parsed: jinja2.nodes.Template = _Ticking().visit(super()._parse(source, name, filename))
        return parsed


class _Ticking(NodeTransformer):
    """Puts a tick at the head of every body that may run many times."""

    def visit_For(self, node: jinja2.nodes.For) -> jinja2.nodes.For:  # noqa: N802  the visitor's name for it
        self.generic_visit(node)
        node.body.insert(0, _tick(node.lineno))
        return node

    def visit_Macro(self, node: jinja2.nodes.Macro) -> jinja2.nodes.Macro:  # noqa: N802
        self.generic_visit(node)
        node.body.insert(0, _tick(node.lineno))
        return node


def _tick(line: int) -> jinja2.nodes.Node:
    # An attribute of the environment, not a name: a template cannot put something else in its place.
    call = jinja2.nodes.Call(jinja2.nodes.EnvironmentAttribute("tick"), [], [], None, None)
    return jinja2.nodes.ExprStmt(call).set_lineno(line)


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks what the model wrote, for training; here it is only what stands inside."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)
