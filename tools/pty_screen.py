"""A command on a terminal that only exists here: what it writes, as a screen would show it, and what a person types.

    with PtyScreen(["sparkrelay", "chat"], columns=80, rows=24) as terminal:
        terminal.expect(">")
        terminal.type("Hello\\n")
        print(terminal.text)

Linux and macOS. Needs pyte (extra `dev`).
"""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType

import pyte

# The pty becomes the child's own terminal, so that Ctrl-C typed there is a signal there. Whoever was started in the background
# of a shell has inherited that such signals are ignored: at a terminal they are not.
LAUNCH = (
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.login_tty(0); "
    "os.execvp(sys.argv[1], sys.argv[1:])"
)
READ_BYTES = 65_536
CTRL_C, CTRL_D = "\x03", "\x04"


class PtyScreen:
    """Runs the command until the context is left; it is killed if it still runs then."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        columns: int = 80,
        rows: int = 24,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.screen = pyte.Screen(columns, rows)
        self.written = b""
        self._stream = pyte.ByteStream(self.screen)
        self._command = command
        self._environment = {
            **(os.environ if environment is None else environment),
            "TERM": "xterm-256color",
            "COLUMNS": str(columns),
            "LINES": str(rows),
        }

    def __enter__(self) -> PtyScreen:
        self._master, slave = pty.openpty()
        size = struct.pack("HHHH", self.screen.lines, self.screen.columns, 0, 0)
        fcntl.ioctl(slave, termios.TIOCSWINSZ, size)
        self._process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, *self._command],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=self._environment,
        )
        os.close(slave)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        os.close(self._master)

    @property
    def text(self) -> str:
        """What the screen shows, without the blanks at the end of lines and the empty lines at the end."""
        return "\n".join(line.rstrip() for line in self.screen.display).rstrip()

    def type(self, text: str) -> None:
        """As if typed."""
        os.write(self._master, text.encode())

    def expect(self, words: str, timeout_s: float = 60.0) -> None:
        """Until the screen shows the words. Raises AssertionError with the screen when time is up or the command has ended."""
        self.wait_until(lambda: words in self.text, repr(words), timeout_s)

    def wait_until(self, condition: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
        """Until the condition holds, asked whenever the command has written something."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            left_s = deadline - time.monotonic()
            assert left_s > 0, f"no {what} on the screen:\n{self.text}"
            assert self._read(left_s) or condition(), f"ended without {what} on the screen:\n{self.text}"

    def wait_for_exit(self, timeout_s: float = 60.0) -> int:
        """Reads to the end; the exit code."""
        deadline = time.monotonic() + timeout_s
        while self._read(deadline - time.monotonic()):
            assert time.monotonic() < deadline, f"still running:\n{self.text}"
        return self._process.wait(timeout=max(deadline - time.monotonic(), 0.1))

    def _read(self, timeout_s: float) -> bool:
        """Takes in what was written; False once the command has ended and all is read."""
        ready, _, _ = select.select([self._master], [], [], max(timeout_s, 0.0))
        if not ready:
            return True
        try:
            content = os.read(self._master, READ_BYTES)
        except OSError:  # Linux says so when the last process has closed the terminal
            content = b""
        self.written += content
        self._stream.feed(content)
        return bool(content)
