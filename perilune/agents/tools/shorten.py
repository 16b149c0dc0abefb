"""Results as a conversation can carry them: whole characters, no longer than a limit, the rest kept elsewhere."""

from __future__ import annotations

from dataclasses import replace

from perilune.agents.tools.base import Artifacts, ToolOutput

MAX_IMAGE_CHARS = 8_000_000
"""Of all `data:` URLs of a result together; what goes beyond is left out."""


def whole_characters(text: str) -> str:
    """Return text that UTF-8 can carry: half surrogate pairs become U+FFFD."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def fit_output(output: ToolOutput, limit: int, name: str, artifacts: Artifacts) -> ToolOutput:
    """Return a result that a conversation can carry.

    Args:
        output: of a tool.
        limit: most characters of its text.
        name: of the tool.
        artifacts: gets the text if it is longer.
    """
    # A tool may break its promise of a str; this is the last place to notice.
    text = output.text if isinstance(output.text, str) else bytes(output.text).decode("utf-8", "replace")
    text = whole_characters(text)
    if len(text) > limit:
        text = cut_middle(text, limit, _keep(text, name, artifacts))
    images = output.images
    if images and sum(map(len, images)) > MAX_IMAGE_CHARS:
        images, text = (), f"{text}\n[{len(output.images)} images left out: more than {MAX_IMAGE_CHARS} characters]"
    return output if text is output.text and images is output.images else replace(output, text=text, images=images)


def cut_middle(text: str, limit: int, hint: str) -> str:
    """Return the first and the last part of a text with a marker between, `limit` characters together.

    Args:
        text: longer than the limit.
        limit: most characters.
        hint: how the rest can be read, a sentence.
    """
    marker = f"\n\n[... cut: {len(text)} characters, of which the middle is left out. {hint} ...]\n\n"
    room = max(0, limit - len(marker))
    tail = room // 3
    return (text[: room - tail] + marker + text[len(text) - tail :])[:limit]


def _keep(text: str, name: str, artifacts: Artifacts) -> str:
    try:
        artifact_id = artifacts.put(text.encode(), name=name)
    except Exception as error:
        return f"The whole could not be kept: {error}."
    return f'read_artifact("{artifact_id}", offset) reads the whole.'
