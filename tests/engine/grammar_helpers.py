"""A toy tokenizer with every byte, an empty and a doubled token, and Kimi's special ones; random walks in grammars."""

import base64
import random
from pathlib import Path

import numpy as np

KIMI_FILE = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "kimi_tokenizer" / "tiktoken.model"

PIECES = [
    '{"',
    '": ',
    '",',
    "true",
    "12",
    "functions",
    "functions.",
    ":0",
    "é",
    "é"[:1] + "a",
    "\n  ",
    "  ",
    "yes",
    "es",
]
SPECIALS = (
    "<|im_end|>",
    "<think>",
    "</think>",
    "<|tool_calls_section_begin|>",
    "<|tool_calls_section_end|>",
    "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>",
    "<|tool_call_end|>",
)


class Toy:
    def __init__(self, pieces=PIECES):
        self.tokens = [bytes([byte]) for byte in range(256)] + [piece.encode() for piece in pieces]
        self.special_ids = {name: len(self.tokens) + place for place, name in enumerate(SPECIALS)}
        self.tokens += [name.encode() for name in SPECIALS]
        self.vocab_size = len(self.tokens)

    def decode_bytes(self, tokens):
        return b"".join(self.tokens[token] for token in tokens)

    def spell(self, text, rng):
        """Random tokens that write `text`; names of special tokens become these."""
        raw, place, ids = text.encode(), 0, []
        while place < len(raw):
            special = [i for name, i in self.special_ids.items() if raw.startswith(name.encode(), place)]
            fits = special or [i for i, piece in enumerate(self.tokens) if piece and raw.startswith(piece, place)]
            ids.append(rng.choice(fits))
            place += len(self.tokens[ids[-1]])
        return ids


class KimiFile:
    """The released vocabulary, straight from its file."""

    vocab_size = 163842

    def __init__(self):
        lines = KIMI_FILE.read_bytes().splitlines()
        self.tokens = [base64.b64decode(line.split()[0]) for line in lines]
        self.special_ids = {f"<|reserved_token_{i}|>": i for i in range(len(self.tokens), self.vocab_size)}
        self.special_ids |= {"<|im_end|>": 163586, "<|tool_calls_section_begin|>": 163595}
        self.special_ids |= {"<|tool_calls_section_end|>": 163596, "<|tool_call_begin|>": 163597}
        self.special_ids |= {"<|tool_call_argument_begin|>": 163598, "<|tool_call_end|>": 163599}

    def decode_bytes(self, tokens):
        return b"".join(self.tokens[i] if i < len(self.tokens) else f"<{i}>".encode() for i in tokens)


def allowed(state):
    bits = np.unpackbits(np.frombuffer(state.allowed(), dtype=np.uint8), bitorder="little")
    return np.nonzero(bits)[0].tolist()


def takes(grammar, ids):
    """How many of `ids` the grammar takes, and whether it may end there."""
    state = grammar.start()
    for count, token in enumerate(ids):
        if token not in allowed(state):
            return count, False
        state.accept(token)
    return len(ids), state.may_end


def walk(grammar, seed, prefer=(), limit=120):
    """Random tokens to an end, or None when there is none within `limit`."""
    rng, state, ids = random.Random(seed), grammar.start(), []
    for _ in range(limit):
        choices = allowed(state)
        assert choices
        ends = set(choices) & set(grammar.end_ids)
        assert bool(ends) == state.may_end
        liked = [token for token in choices if token in prefer]
        token = rng.choice(liked if liked and rng.random() < 0.5 else choices)
        if token in ends:
            return ids
        state.accept(token)
        ids.append(token)
    return None
