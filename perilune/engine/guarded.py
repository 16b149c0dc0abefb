"""Grammars are foreign code: whatever goes wrong in one ends the response that it was for, and no other."""

from __future__ import annotations

import logging

from perilune.engine.requests import GrammarState, TokenGrammar

logger = logging.getLogger(__name__)


class GuardedState:
    """Where one response stands in its grammar."""

    def __init__(self, grammar: TokenGrammar) -> None:
        """Begin."""
        self.error = ""
        """Why no token is allowed any more; empty while the grammar has not failed."""
        self._state: GrammarState | None = None
        try:
            self._state = grammar.start()
        except Exception as error:
            self._fail(error)

    def allowed(self) -> bytes:
        """Tokens that may come next, as `GrammarState` has them; none once the grammar has failed."""
        if self._state is None:
            return b""
        try:
            mask, self.error = self._state.allowed(), self._state.error
        except Exception as error:
            self._fail(error)
            return b""
        return b"" if self.error else mask

    def accept(self, token: int) -> None:
        """Go on by one token."""
        if self._state is None:
            return
        try:
            self._state.accept(token)
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        logger.warning("a grammar failed", exc_info=error)
        self._state, self.error = None, f"{type(error).__name__}: {error}"
