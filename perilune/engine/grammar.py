"""Grammars that a response must follow: JSON schema, regular expression, choice, Lark.

`llguidance` (MIT; one wheel for all Python versions, needs nothing else) parses the text so far and names the tokens
that keep it in the grammar. No spelling is forced: every token whose bytes fit may come.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from perilune.errors import EngineError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_MAX_CACHED = 256
_MAX_CHARS = 1_000_000
# Free whitespace lets a weak model write newlines for ever: at most a space, or a line end with its indentation.
_JSON_OPTIONS = {"whitespace_pattern": r"( |\n[ \t]{0,64})", "whitespace_flexible": True, "lenient": False}


class TokenTable(Protocol):
    """The part of a tokenizer that grammars need."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        ...

    @property
    def special_ids(self) -> Mapping[str, int]:
        """Ids of the tokens that stand for no text, by name."""
        ...

    def decode_bytes(self, tokens: Iterable[int], /) -> bytes:
        """Return the bytes that the tokens stand for."""
        ...


class CompiledGrammar:
    """A grammar for one vocabulary; a `perilune.engine.requests.TokenGrammar`."""

    def __init__(self, matcher: LLMatcher, end_ids: tuple[int, ...], num_bytes: int) -> None:
        self._matcher, self._num_bytes = matcher, num_bytes
        self._end_ids = end_ids

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end a response; allowed only where the grammar may end."""
        return self._end_ids

    def start(self) -> MatcherState:
        """Return the state before the first token, to be moved by one response."""
        return MatcherState(self._matcher.deep_copy(), self._num_bytes)


class MatcherState:
    """Where one response stands in its grammar."""

    def __init__(self, matcher: LLMatcher, num_bytes: int) -> None:
        self._matcher, self._num_bytes = matcher, num_bytes

    def allowed(self) -> bytes:
        """Tokens that may come next, a bit each, lowest bit first; none after a token that was not allowed."""
        if not self._matcher.is_error():
            mask = self._matcher.compute_bitmask()
            if not self._matcher.is_error():
                return mask
        return bytes(self._num_bytes)

    def accept(self, token: int) -> None:
        """Go on by one token."""
        self._matcher.consume_token(token)

    @property
    def may_end(self) -> bool:
        """Whether the text so far is whole."""
        return self._matcher.is_accepting()

    @property
    def error(self) -> str:
        """Why no token is allowed any more; empty while all is well."""
        return _reason(self._matcher.get_error())


class GrammarCompiler:
    """Makes grammars for one tokenizer; keeps what it made last. Threads may share it.

    >>> from perilune.data import train_tokenizer
    >>> tokenizer = train_tokenizer(["a b c"], 266)
    >>> grammar = GrammarCompiler(tokenizer, end_ids=[tokenizer.end_id]).choice(["yes", "no"])
    >>> grammar.end_ids == (tokenizer.end_id,)
    True
    """

    def __init__(
        self,
        tokenizer: TokenTable,
        end_ids: Sequence[int],
        *,
        thinking_ids: tuple[int, int] | None = None,
        vocab_size: int | None = None,
    ) -> None:
        """Read the bytes of every token (a second for 160,000 of them).

        Args:
            tokenizer: gives the bytes.
            end_ids: tokens that end a response, such as `<|im_end|>`; the first is the usual one.
            thinking_ids: the tokens around reasoning, such as `<think>` and `</think>`; None for a model without.
            vocab_size: the model's vocabulary where it is smaller than the tokenizer's.

        Raises:
            EngineError: `llguidance` is not installed, or an id is outside the vocabulary.
        """
        self._num_tokens = min(tokenizer.vocab_size, vocab_size or tokenizer.vocab_size)
        if not end_ids:
            raise EngineError("a grammar needs a token that ends the response: end_ids is empty")
        for token in (*end_ids, *(thinking_ids or ())):
            if not 0 <= token < self._num_tokens:
                raise EngineError(f"token {token} is outside the vocabulary of {self._num_tokens}")
        self._end_ids = tuple(end_ids)
        self._thinking_ids = thinking_ids
        self._tokenizer = _build_tokenizer(tokenizer, self._num_tokens, self._end_ids)
        self._lock = threading.Lock()
        self._compiled: OrderedDict[str, CompiledGrammar] = OrderedDict()

    @property
    def thinking_ids(self) -> tuple[int, int] | None:
        """The tokens around reasoning."""
        return self._thinking_ids

    def json_schema(
        self, schema: Mapping[str, object] | bool | str, *, after_thinking: bool = False
    ) -> CompiledGrammar:
        """JSON that `schema` (or its JSON text) accepts.

        Args:
            schema: a JSON Schema; a keyword that cannot be enforced is refused, not passed over.
            after_thinking: the response begins with reasoning, and the grammar after `</think>`; the `<think>` before
                it may be part of the prompt.

        Raises:
            EngineError: the schema is invalid, unsupported, or accepts nothing; the message says what is wrong with it.
        """
        return self.compile([_body("json_schema", with_json_options(schema))], "json_schema", after_thinking)

    def json_object(self, *, after_thinking: bool = False) -> CompiledGrammar:
        """Any JSON object."""
        return self.json_schema({"type": "object"}, after_thinking=after_thinking)

    def regex(self, pattern: str, *, after_thinking: bool = False) -> CompiledGrammar:
        """Text that `pattern` matches as a whole (Rust's syntax: Unicode, no look-around, no back-references).

        Raises:
            EngineError: the pattern is invalid.
        """
        from llguidance import LLMatcher

        source = json.loads(LLMatcher.grammar_from_regex(pattern))["grammars"][0]["lark_grammar"]
        return self.compile([_body("lark_grammar", source)], "regex", after_thinking)

    def lark(self, grammar: str, *, after_thinking: bool = False) -> CompiledGrammar:
        """A context-free grammar in llguidance's variant of Lark's EBNF; its first rule is `start`.

        Raises:
            EngineError: the grammar is invalid; the message says where.
        """
        return self.compile([_body("lark_grammar", grammar)], "grammar", after_thinking)

    def choice(self, options: Sequence[str], *, after_thinking: bool = False) -> CompiledGrammar:
        """Exactly one of `options`.

        Raises:
            EngineError: there is none, or one is empty.
        """
        if not options or not all(options):
            raise EngineError("choice needs at least one option, and none may be empty")
        source = "start: " + " | ".join(quote(option) for option in options)
        return self.compile([_body("lark_grammar", source)], "choice", after_thinking)

    def compile(
        self, grammars: Sequence[Mapping[str, object]], what: str, after_thinking: bool = False
    ) -> CompiledGrammar:
        """Compile llguidance grammars of which the first is named `body`.

        Args:
            grammars: objects with a `name` and a `lark_grammar` or `json_schema`.
            what: the name that errors give it.
            after_thinking: as for `json_schema`.

        Raises:
            EngineError: they are invalid.
        """
        from llguidance import LLMatcher

        start = {"lark_grammar": self._start(after_thinking)}
        try:
            source = json.dumps({"grammars": [start, *grammars]}, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise EngineError(f"{what}: not JSON: {error}") from error
        if len(source) > _MAX_CHARS:
            raise EngineError(f"{what}: too long: {len(source)} characters, at most {_MAX_CHARS}")
        with self._lock:
            if found := self._compiled.get(source):
                self._compiled.move_to_end(source)
                return found
        matcher = LLMatcher(self._tokenizer, source, log_level=0)
        grammar = CompiledGrammar(matcher, self._end_ids, -(-self._num_tokens // 32) * 4)
        first = grammar.start()
        if not any(first.allowed()):
            raise EngineError(f"{what}: {_reason(matcher.get_error() or first.error) or 'no text follows it'}")
        with self._lock:
            self._compiled[source] = grammar
            if len(self._compiled) > _MAX_CACHED:
                self._compiled.popitem(last=False)
        return grammar

    def _start(self, after_thinking: bool) -> str:
        """The rule above `body`."""
        options = '%llguidance {"no_forcing": true}\n'
        if not after_thinking:
            return options + "start: @body"
        if self._thinking_ids is None:
            raise EngineError("after_thinking needs thinking_ids, the tokens around reasoning")
        first, last = self._thinking_ids
        thought = r"THOUGHT: /(?s:.+)/" + "\n" + r"BREAK: /\n{1,2}/"
        return options + f"start: <[{first}]>? THOUGHT? <[{last}]> BREAK? @body\n{thought}"


def with_json_options(schema: Mapping[str, object] | bool | str) -> object:
    """The schema with this project's rules of whitespace; one that is text is read.

    Raises:
        EngineError: the text is not JSON, or the schema is neither an object nor a boolean.
    """
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except ValueError as error:
            raise EngineError(f"json_schema: not JSON: {error}") from error
    if isinstance(schema, bool):
        if not schema:
            raise EngineError("json_schema: the schema false accepts nothing")
        # A boolean has no place for options.
        schema = {}
    if not isinstance(schema, Mapping):
        raise EngineError(f"json_schema: a schema is an object, got {type(schema).__name__}")
    return {**schema, "x-guidance": _JSON_OPTIONS}


def quote(text: str) -> str:
    """`text` as a literal of a Lark grammar."""
    return json.dumps(text, ensure_ascii=False)


def _body(kind: str, source: object) -> dict[str, object]:
    return {"name": "body", kind: source}


def _reason(message: str) -> str:
    """Message of llguidance in one line, without the dump of the grammar or of its state that may follow it."""
    lines = [line.strip() for line in message.split("\n\n")[0].split("\n<state>")[0].splitlines()]
    return " ".join(line for line in lines if line)[:500]


def _build_tokenizer(tokenizer: TokenTable, num_tokens: int, end_ids: Sequence[int]) -> LLTokenizer:
    try:
        from llguidance import LLTokenizer, TokenizerWrapper
    except ImportError as error:
        raise EngineError("constrained decoding needs llguidance: pip install 'perilune[grammar]'") from error
    special = {token for token in tokenizer.special_ids.values() if token < num_tokens} | set(end_ids)
    tokens = [tokenizer.decode_bytes([token]) for token in range(num_tokens)]
    # Special tokens are only ever named by their ids; what they are called must just not be text.
    for token in special:
        tokens[token] = f"<|{token}|>".encode()
    wrapper = TokenizerWrapper(_ByteTokens(tokens, sorted(special), end_ids[0]))
    return LLTokenizer(wrapper, n_vocab=num_tokens, eos_token=list(end_ids))


class _ByteTokens:
    """The vocabulary as llguidance reads it."""

    bos_token_id = None

    def __init__(self, tokens: list[bytes], special: list[int], end_id: int) -> None:
        self.tokens, self.special_token_ids, self.eos_token_id = tokens, special, end_id
        self._single = {raw[0]: token for token, raw in enumerate(tokens) if len(raw) == 1}

    def __call__(self, text: bytes | str) -> list[int]:
        """Spell in single bytes: nothing is forced, so how text is usually spelled does not matter."""
        raw = text.encode() if isinstance(text, str) else text
        return [self._single[byte] for byte in raw if byte in self._single]
