import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perilune.engine import StopFinder, TextStream, token_text
from perilune.errors import EngineError


class Bytes:
    """Token i is the i-th of a list of byte strings."""

    def __init__(self, tokens):
        self.tokens = tokens

    def decode_bytes(self, tokens):
        return b"".join(self.tokens[token] for token in tokens)


def cut(draw, whole):
    """Random pieces of `whole`, empty ones too."""
    places = sorted(draw(st.lists(st.integers(0, len(whole)), max_size=8)))
    return [whole[a:b] for a, b in zip([0, *places], [*places, len(whole)], strict=True)]


def first_stop(text, stops):
    """Character by character: where the text ends, and why."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


characters = st.text(alphabet="abé🌙", max_size=14)
stop_lists = st.lists(st.text(alphabet="abé🌙", min_size=1, max_size=4), max_size=3)


@settings(max_examples=150, deadline=None)
@given(st.data(), characters, stop_lists)
def test_a_stop_string_is_found_at_the_same_place_however_the_text_is_cut(data, text, stops):
    expected, stop = first_stop(text, stops)
    finder, given_ = StopFinder(stops), ""
    for piece in cut(data.draw, text):
        given_ += finder.push(piece)
        assert expected.startswith(given_)
    assert given_ + finder.finish() == expected
    assert finder.found == stop


@settings(max_examples=150, deadline=None)
@given(st.data(), st.binary(max_size=12) | characters.map(str.encode), stop_lists)
def test_a_stream_gives_the_text_of_the_whole_up_to_a_stop_string(data, raw, stops):
    tokens = cut(data.draw, raw)
    expected, stop = first_stop(raw.decode("utf-8", errors="replace"), stops)
    stream, pieces = TextStream(Bytes(tokens), stops=stops), []
    for group in cut(data.draw, list(range(len(tokens)))):
        pieces.append(stream.push(group))
        assert expected.startswith("".join(piece.text for piece in pieces))
    pieces.append(stream.finish())
    assert "".join(piece.text for piece in pieces) == expected
    assert stream.stop == stop
    offsets = [offset for piece in pieces for offset in piece.offsets]
    assert sum(piece.num_tokens for piece in pieces) == len(offsets)
    if stop is None:
        assert stream.num_tokens == len(offsets) == len(tokens)
    # A token's offset is the number of characters that are whole before it.
    starts = [b"".join(tokens[:place]) for place in range(len(tokens))]
    assert offsets == [len(_whole(start)) for start in starts[: len(offsets)]]
    # No settled token lies wholly behind the cut.
    assert all(offset <= len(expected) for offset in offsets)


def _whole(raw):
    import codecs

    return codecs.getincrementaldecoder("utf-8")(errors="replace").decode(raw)


def test_a_token_is_settled_with_the_last_character_it_has_part_in():
    stream = TextStream(Bytes(["é".encode()[:1], "é".encode()[1:] + b"x", b"y"]))
    assert (stream.push([0]).num_tokens, stream.push([1]).num_tokens) == (0, 2)


def test_tokens_of_a_stop_string_are_never_settled():
    stream = TextStream(Bytes([b"go", b" S", b"TO", b"P!"]), stops=["STOP"])
    pieces = [stream.push([token]) for token in (0, 1, 2, 3)]
    assert [piece.text for piece in pieces] == ["go", " ", "", ""]
    assert [piece.num_tokens for piece in pieces] == [1, 0, 0, 1]
    assert pieces[-1].offsets == (2,)
    assert stream.push([0]).text == stream.finish().text == ""
    assert (stream.stop, stream.num_tokens) == ("STOP", 4)


def test_text_that_only_began_like_a_stop_string_comes_at_the_end():
    stream = TextStream(Bytes([b"a ST"]), stops=["STOP"])
    assert stream.push([0]).text == "a "
    last = stream.finish()
    assert (last.text, last.num_tokens, stream.stop) == ("ST", 1, None)


def test_hidden_tokens_write_nothing():
    stream = TextStream(Bytes([b"a", b"<end>"]), hidden_ids=[1])
    piece = stream.push([0, 1, 0])
    assert (piece.text, piece.offsets) == ("aa", (0, 1, 1))


def test_token_text_shows_bytes_that_are_no_character():
    assert token_text(Bytes(["🌙".encode()[:2], b"ok"]), 0) == ("�", "🌙".encode()[:2])
    assert token_text(Bytes([b"ok"]), 0) == ("ok", b"ok")


@pytest.mark.parametrize("stop", ["", "x" * 1025])
def test_stop_strings_of_impossible_length_are_refused(stop):
    with pytest.raises(EngineError, match="a stop string has 1 to 1024 characters"):
        TextStream(Bytes([]), stops=["fine", stop])
