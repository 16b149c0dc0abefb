"""Tokenizers of a few hundred tokens, of every kind that is read."""

import base64
import json
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from perilune.data import KimiTokenizer

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
KIMI = SHARED / "kimi_tokenizer"
TEXTS = [
    "the cat sat on the mat, and that was that",
    "a world of text: Hello, Hello world! 12 345",
    "def f(x):\n    return x",
]
MERGES = (b"th", b"the", b"at", b" t", b"in", b" w", b"\xe6\x9c", b"\xe6\x9c\x88", b"12")


def byte_level(specials=("<|endoftext|>", "<|im_start|>", "<|im_end|>"), plain=(), ignore_merges=False):
    """A `tokenizer.json` as of GPT-2 and its heirs."""
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        show_progress=False,
        special_tokens=list(specials),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    backend.train_from_iterator(TEXTS, trainer)
    backend.add_tokens([AddedToken(name, normalized=False) for name in plain])
    return backend.to_str()


def pieces(scheme="first"):
    """A `tokenizer.json` as of Llama 2: SentencePiece's pieces, bytes where there is none."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for piece in ("▁", "H", "i", "t", "h", "e", "Hi", "▁Hi", "th", "the", "▁the"):
        vocab[piece] = len(vocab)
    merges = [("H", "i"), ("▁", "Hi"), ("t", "h"), ("th", "e"), ("▁", "the")]
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
    if scheme == "normalizer":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend.to_str()


def kimi(merges=MERGES):
    return KimiTokenizer(kimi_ranks(merges))


def kimi_ranks(merges=MERGES):
    return {token: rank for rank, token in enumerate([*(bytes([byte]) for byte in range(256)), *merges])}


def write_kimi(directory, ranks=None, config=None):
    lines = [f"{base64.b64encode(token).decode()} {rank}" for token, rank in (ranks or kimi_ranks()).items()]
    (directory / "tiktoken.model").write_text("\n".join(lines) + "\n")
    if config is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory
