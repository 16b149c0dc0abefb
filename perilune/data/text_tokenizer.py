"""What chat, serving and constrained generation need of a tokenizer, whichever model it belongs to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

from perilune.data.hf_tokenizer import HFTokenizer
from perilune.data.kimi_tokenizer import KimiTokenizer
from perilune.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from perilune.data.tokenizer_files import TOKENIZER_CONFIG, read_json
from perilune.errors import DataError


class TextTokenizer(Protocol):
    """Text to token ids and back; `Tokenizer`, `HFTokenizer` and `KimiTokenizer` are such."""

    @property
    def vocab_size(self) -> int:
        """Ids are below this; some may stand for nothing."""
        ...

    @property
    def special_ids(self) -> Mapping[str, int]:
        """Id of each token that text must never become, by name."""
        ...

    @property
    def bos_id(self) -> int | None:
        """Id that starts a document, if there is one; neither `encode` nor `encode_chat` adds it."""
        ...

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        """Ids that a text which is to be continued begins with, as the model was trained; `encode` does not add them.

        Conversations have none: what their beginning is, the template says.
        """
        ...

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an answer."""
        ...

    def encode(self, text: str, *, parse_specials: bool = False) -> list[int]:
        """Encode text; no token is added at either end.

        Args:
            text: any string without lone surrogates.
            parse_specials: turn the names of special tokens into their ids. Only for text from trusted code.

        Raises:
            ValueError: the text holds a lone surrogate, which has no UTF-8 form.
        """
        ...

    def decode_bytes(self, tokens: Iterable[int], *, skip_specials: bool = False) -> bytes:
        """Return the bytes the tokens stand for; ids that stand for nothing give none.

        Special tokens give their names. With `skip_specials` they give none, but for those that a model writes for a
        parser to read, such as Kimi's tool calls and thoughts, where the tokenizer's files tell them apart.

        Raises:
            ValueError: an id is not within the vocabulary.
        """
        ...

    def decode(self, tokens: Iterable[int], *, skip_specials: bool = False) -> str:
        """Return the text the tokens stand for; bytes that are not UTF-8 become U+FFFD."""
        ...


def load_tokenizer(directory: Path) -> TextTokenizer:
    """Read the tokenizer of a model's directory; nothing in it is run.

    `tiktoken.model` is Kimi's, `tokenizer.json` is this project's if it holds exactly its special tokens, else that of
    any other byte-level or SentencePiece-like BPE.

    Args:
        directory: of a checkpoint, or of a run's tokenizer.

    Raises:
        DataError: there is no tokenizer that can be read, or it is damaged.
    """
    file = directory / "tokenizer.json"
    wants_tiktoken = "TikToken" in str(read_json(directory / TOKENIZER_CONFIG).get("tokenizer_class", ""))
    if (directory / "tiktoken.model").is_file() and (wants_tiktoken or not file.is_file()):
        return KimiTokenizer.load(directory)
    if file.is_file():
        added = read_json(file).get("added_tokens") or []
        names = {token.get("content") for token in added if isinstance(token, dict)}
        return Tokenizer.load(file) if names == set(SPECIAL_TOKENS) else HFTokenizer.load(directory)
    if (directory / "tokenizer.model").is_file():
        raise DataError(
            f"{directory / 'tokenizer.model'}: a SentencePiece model; save it as tokenizer.json with transformers' "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    raise DataError(f"{directory} has no tokenizer: neither tokenizer.json nor tiktoken.model is there")
