"""The terminal of `rlhf label`: draws a question to fit the window, reads a key (or a line, through a pipe)."""

import io
import os
import select
import sys
import termios
import tty
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.segment import Segment, Segments
from rich.text import Text

from rlhf.label.pairs import Question
from rlhf.runtime import print_anything, visible

KEYS = {"1": "1", "2": "2", "t": "tie", "b": "bad", "s": "skip", "u": "undo", "q": "quit", "m": "more"}
WORDS = {"tie": "tie", "bad": "bad", "both bad": "bad", "skip": "skip", "undo": "undo", "quit": "quit"}
LEGEND = ("1 first better", "2 second", "t tie", "b both bad", "s skip", "u undo", "q quit")
ENDS = {*KEYS.values()} - {"more"}  # of a question
END_OF_INPUT = "\x04"  # what Ctrl-D gives where keys are read one by one
REDRAW = "redraw"
BORDER = 4  # columns that a panel takes beside its text; and 2 rows above and below
LOOK = 0.5  # seconds between looks at the window


class Block:
    """One part of a question: a prompt or a response, with its title. A prompt that is too long loses its beginning."""

    def __init__(self, title: str, text: Text, *, keep_end: bool = False) -> None:
        self.title, self.text, self.keep_end = title, text, keep_end

    def panel(self, lines: list[Text] | None = None) -> Panel:
        """The whole text in a frame, or these lines."""
        shown = self.text if lines is None else Text("\n").join(lines)
        return Panel(shown, title=self.title, title_align="left")

    def cut(self, console: Console, rows: int) -> Panel:
        """At most so many rows of the text in a frame, the last or first of them saying how many there are more."""
        lines = list(self.text.wrap(console, console.width - BORDER))
        left = len(lines) - rows
        if left <= 0:
            return self.panel()
        more = Text(f"... {left + 1} more lines (m)", style="dim")
        return self.panel([more, *lines[left + 1 :]] if self.keep_end else [*lines[: rows - 1], more])

    def height(self, console: Console) -> int:
        """Rows of the whole text."""
        return len(self.text.wrap(console, console.width - BORDER))


def blocks_of(question: Question) -> list[Block]:
    """The prompt with its turns, and the two responses in the order in which they are shown."""
    prompt = Text()
    for number, message in enumerate(question.pair.prompt):
        prompt.append("\n" if number else "").append(f"{message['role']}: ", style="bold")
        prompt.append(visible(message["content"]))
    shown = [question.pair.responses[question.first], question.pair.responses[1 - question.first]]
    texts = [Text(visible(text)) if text.strip() else Text("(empty)", style="dim") for text in shown]
    return [Block("prompt", prompt, keep_end=True), Block("response 1", texts[0]), Block("response 2", texts[1])]


def shares(heights: Sequence[int], rows: int) -> list[int]:
    """How many rows each of several texts gets: what a short one leaves is for the longer ones; at least one each."""
    given = [0] * len(heights)
    for done, index in enumerate(sorted(range(len(heights)), key=lambda i: heights[i])):
        fair = max(1, rows // (len(heights) - done))
        given[index] = min(heights[index], fair)
        rows -= given[index]
    return given


class Screen:
    """Where the person sits. Use it with `with`: the terminal is given back as it was, however that ends."""

    def __init__(self) -> None:
        print_anything()
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")
        self._console = Console(highlight=False)
        self._keyed = sys.stdin.isatty()
        self._window = self._keyed and self._console.is_terminal  # a question fills the window, and keys turn its pages
        self._saved = termios.tcgetattr(sys.stdin) if self._keyed else None

    def __enter__(self) -> "Screen":
        if self._keyed:
            tty.setcbreak(sys.stdin, termios.TCSANOW)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._saved:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, self._saved)

    def say(self, text: str) -> None:
        """Prints a text below what is there."""
        self._console.print(Text(visible(text)), soft_wrap=True)

    def ask(self, question: Question, header: str, note: str) -> str:
        """Shows a question until the person answers it, with one of `ANSWERS`, `undo` or `quit`.

        Raises EOFError where nobody is there any more.
        """
        blocks, page = blocks_of(question), 0
        self._forget_keys()
        self._draw(blocks, header, note, page)
        while True:
            said = self._read_key() if self._keyed else self._read_line()
            if said in ENDS:
                return said
            page += said == "more"
            if said not in ("more", REDRAW):
                note = f"{said!r} is none of the keys" if said else ""
            if self._window:
                self._draw(blocks, header, note, page)
            else:
                self.say(f"{said!r} is none of: {', '.join(LEGEND)}")

    def end(self) -> None:
        """Leaves the line of keys."""
        if self._keyed:
            self._console.print()

    # Drawing

    def _draw(self, blocks: list[Block], header: str, note: str, page: int) -> None:
        above = [Text(visible(line), style=style) for line, style in ((header, "bold"), (note, "yellow")) if line]
        if not self._window:
            self._console.print(*above, *(block.panel() for block in blocks), self._legend(1, 0), sep="\n")
            return
        rows = self._console.height - sum(self._rows(line) for line in above) - self._rows(self._legend(99, 1))
        views = self._views(blocks, rows)
        self._console.clear()
        self._console.print(*above, views[page % len(views)], sep="\n")
        self._console.print(self._legend(len(views), page), end="")

    def _views(self, blocks: list[Block], rows: int) -> list[RenderableType]:
        """The whole question where it fits into so many rows; else its parts cut to fit, then all of it in pages."""
        lines = self._console.render_lines(Group(*(block.panel() for block in blocks)))
        if len(lines) <= rows:
            return [Group(*(block.panel() for block in blocks))]
        given = shares([block.height(self._console) for block in blocks], rows - 2 * len(blocks))
        cut = Group(*(block.cut(self._console, most) for block, most in zip(blocks, given, strict=True)))
        pages = [lines[start : start + max(1, rows)] for start in range(0, len(lines), max(1, rows))]
        return [cut, *(Segments([s for line in page for s in (*line, Segment.line())]) for page in pages)]

    def _legend(self, views: int, page: int) -> Text:
        more = [f"m more {page % views}/{views - 1}" if page % views else "m more"] if views > 1 else []
        parts = [Text.assemble((part[0], "bold"), part[1:]) for part in (*LEGEND, *more)]
        return Text("  ").join(parts)

    def _rows(self, line: Text) -> int:
        return len(line.wrap(self._console, self._console.width))

    # Reading

    def _forget_keys(self) -> None:
        """What was typed before a question is there is no answer to it."""
        if self._keyed:
            termios.tcflush(sys.stdin, termios.TCIFLUSH)

    def _read_key(self) -> str:
        """What a key stands for; the key itself where it stands for nothing; REDRAW where the window has changed."""
        tty.setcbreak(sys.stdin, termios.TCSANOW)
        size = self._console.size
        while not select.select([sys.stdin], [], [], LOOK)[0]:
            woken = termios.tcgetattr(sys.stdin)[3] & termios.ICANON  # the shell's own mode, after Ctrl-Z and fg
            if self._window and (woken or self._console.size != size):
                return REDRAW
        typed = os.read(sys.stdin.fileno(), 64).decode("utf-8", "replace")
        if not typed or typed[0] == END_OF_INPUT:
            raise EOFError
        return "" if typed[0] == "\x1b" else KEYS.get(typed[0].lower(), typed[0])

    def _read_line(self) -> str:
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        said = line.strip().lower()
        return KEYS.get(said, WORDS.get(said, said[:20]))
