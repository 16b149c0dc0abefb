"""What byte-level tokenizers have in common: where text is cut, and how files spell bytes."""

from __future__ import annotations

import re
from collections.abc import Iterable

_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"


def kimi_split_pattern(numbers: str) -> str:
    r"""Return Kimi's pre-tokenization as a regular expression with Unicode classes and their intersections.

    Args:
        numbers: expression for a run of digits; Kimi's is `\p{N}{1,3}`.

    Source: Kimi K2 release, tokenizer.
    """
    return "|".join(
        [
            r"[\p{Han}]+",
            rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SUFFIX}",
            rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SUFFIX}",
            numbers,
            r" ?[^\s\p{L}\p{N}]+[\r\n]*",
            r"\s*[\r\n]+",
            r"\s+(?!\S)",
            r"\s+",
        ]
    )


def check_text(text: str) -> None:
    """Refuse text that has no UTF-8 form.

    Raises:
        ValueError: it holds a lone surrogate.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"text holds a lone surrogate at character {error.start}; it has no UTF-8 form") from error


def special_pattern(names: Iterable[str]) -> re.Pattern[str]:
    """Return what finds the names of special tokens in text, the longest first; without names it finds nothing."""
    ordered = sorted(names, key=len, reverse=True)
    return re.compile("|".join(re.escape(name) for name in ordered) or r"(?!)")


def split_specials(text: str, pattern: re.Pattern[str]) -> list[tuple[str, bool]]:
    """Cut text into (piece, is a special token's name); ordinary pieces are not empty."""
    pieces: list[tuple[str, bool]] = []
    end = 0
    for match in pattern.finditer(text):
        if match.start() > end:
            pieces.append((text[end : match.start()], False))
        pieces.append((match[0], True))
        end = match.end()
    if end < len(text):
        pieces.append((text[end:], False))
    return pieces


def printable_to_byte() -> dict[str, int]:
    """Return the byte each character of the byte-level alphabet stands for.

    Printable Latin-1 bytes stand for themselves; the others take the code points from 256 up, in byte order.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(visible)]
    return {chr(byte): byte for byte in visible} | {chr(256 + rank): byte for rank, byte in enumerate(hidden)}
