"""What the terminal view asks of a person: a key, or a line of words. Textual is imported when a class is asked for."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from textual.screen import ModalScreen

DIALOG_CSS = """
Dialog, Words { align: center middle; }
#box { width: 80; max-width: 95%; height: auto; max-height: 90%; padding: 0 1; }
#box { background: $surface; border: round $primary; }
#body { height: auto; max-height: 60vh; margin: 1 0; }
"""


@cache
def dialog_class() -> type[ModalScreen[str]]:
    """Return the class of a question that one key answers: `(question, body, answers)`, answers by key."""
    from rich.text import Text
    from textual.app import ComposeResult
    from textual.containers import Vertical, VerticalScroll
    from textual.screen import ModalScreen
    from textual.widgets import Static

    class Dialog(ModalScreen[str]):
        """A question that one key answers; Escape answers nothing."""

        def __init__(self, question: str, body: str, answers: dict[str, str]) -> None:
            super().__init__()
            self.question, self.body, self.answers = question, body, answers

        def compose(self) -> ComposeResult:
            keys = "   ".join(f"{key} {word}" for key, word in self.answers.items())
            with Vertical(id="box"):
                with VerticalScroll(id="body"):
                    yield Static(Text.assemble((f"{self.question}\n\n", "bold"), self.body))
                yield Static(Text(f"{keys}   Esc back", "dim"))

        def on_key(self, event: Any) -> None:
            if event.character in self.answers:
                event.stop()
                self.dismiss(event.character)
            elif event.key == "escape":
                event.stop()
                self.dismiss("")

    return Dialog


@cache
def words_class() -> type[ModalScreen[str]]:
    """Return the class of a line to say to an agent: `(title, body)`."""
    from rich.text import Text
    from textual.app import ComposeResult
    from textual.containers import Vertical, VerticalScroll
    from textual.screen import ModalScreen
    from textual.widgets import Input, Static

    class Words(ModalScreen[str]):
        """A line to say to an agent; Escape says nothing."""

        BINDINGS = [("escape", "dismiss('')", "back")]  # noqa: RUF012

        def __init__(self, title: str, body: str) -> None:
            super().__init__()
            self.heading, self.body = title, body

        def compose(self) -> ComposeResult:
            with Vertical(id="box"):
                with VerticalScroll(id="body"):
                    yield Static(Text.assemble((f"{self.heading}\n\n", "bold"), self.body))
                yield Input(id="words", placeholder="Enter sends, Esc goes back")

        def on_mount(self) -> None:
            self.query_one(Input).focus()

        def on_input_submitted(self, event: Input.Submitted) -> None:
            self.dismiss(event.value.strip())

    return Words
