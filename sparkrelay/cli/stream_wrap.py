"""Text that comes in pieces, broken between words to a terminal's width. Pure.

A word is held back until it is known to be whole, so that no line is ever taken back. The terminal itself never wraps: it is
always known in which column the cursor is, and a status line can be drawn below.
"""

from __future__ import annotations

from rich.cells import cell_len

NARROWEST = 10


class StreamWrap:
    """Feed it pieces, print what comes back.

    column  cells that the current line holds of what was given back
    """

    def __init__(self, width: int) -> None:
        self.column = 0
        self._width = max(width, NARROWEST)
        self._blanks = ""  # before the word that is held back
        self._word = ""

    def resize(self, width: int) -> None:
        """From now on, lines of at most so many cells."""
        self._width = max(width, NARROWEST)

    def feed(self, text: str) -> str:
        """What can be shown now: at most one word is held back."""
        return "".join(self._take(character) for character in text)

    def flush(self) -> str:
        """What was held back; the text has ended."""
        shown, self._blanks = self._place_word(), ""
        return shown

    def _take(self, character: str) -> str:
        if character == "\n":
            shown = self._place_word() + "\n"
            self._blanks, self.column = "", 0
            return shown
        if character == " ":
            shown = self._place_word()
            self._blanks += character
            return shown
        if cell_len(character) == 2:  # scripts that are written without spaces break anywhere
            shown = self._place_word()
            self._word = character
            return shown + self._place_word()
        self._word += character
        # A word that fills a whole line cannot get longer: it is broken here.
        return self._place_word() if cell_len(self._word) >= self._width else ""

    def _place_word(self) -> str:
        """The held back word with its blanks, on this line or, if it does not fit, on the next one without them."""
        if not self._word:
            return ""
        word, blanks = self._word, self._blanks
        self._word = self._blanks = ""
        size = cell_len(word)
        if self.column + len(blanks) + size <= self._width:
            self.column += len(blanks) + size
            return blanks + word
        if self.column == 0 and blanks:  # deep indentation: as much of it as there is room for
            blanks = blanks[: self._width - size]
            self.column = len(blanks) + size
            return blanks + word
        self.column = size
        return "\n" + word
