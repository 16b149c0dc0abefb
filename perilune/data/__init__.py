"""Tokenizer, chat template, corpora, packed batches and their sources."""

from perilune.data.batches import (
    BatchSource,
    ConversationSource,
    DrawSource,
    PreferencePair,
    PreferenceSource,
    WindowSource,
    encode_documents,
    pack_pairs,
)
from perilune.data.chat import Message, encode_conversation, encode_prompt, encode_response, split_response
from perilune.data.mixture import MixtureSource, apportion
from perilune.data.packing import (
    IGNORE_INDEX,
    Batch,
    Example,
    concat_batches,
    pack_examples,
    plan_bins,
)
from perilune.data.sources import (
    Corpus,
    CorpusConfig,
    EmbeddedCorpusConfig,
    FilesCorpusConfig,
    check_corpus,
    compression_baselines,
    load_corpus,
)
from perilune.data.synthetic import (
    CopiesConfig,
    PalindromeConfig,
    RecallConfig,
    StackConfig,
    SyntheticConfig,
    SyntheticSource,
    synthetic_batch,
)
from perilune.data.tokenizer import MIN_VOCAB_SIZE, SPECIAL_TOKENS, Tokenizer, bits_per_byte, train_tokenizer

__all__ = [
    "IGNORE_INDEX",
    "MIN_VOCAB_SIZE",
    "SPECIAL_TOKENS",
    "Batch",
    "BatchSource",
    "ConversationSource",
    "CopiesConfig",
    "Corpus",
    "CorpusConfig",
    "DrawSource",
    "EmbeddedCorpusConfig",
    "Example",
    "FilesCorpusConfig",
    "Message",
    "MixtureSource",
    "PalindromeConfig",
    "PreferencePair",
    "PreferenceSource",
    "RecallConfig",
    "StackConfig",
    "SyntheticConfig",
    "SyntheticSource",
    "Tokenizer",
    "WindowSource",
    "apportion",
    "bits_per_byte",
    "check_corpus",
    "compression_baselines",
    "concat_batches",
    "encode_conversation",
    "encode_documents",
    "encode_prompt",
    "encode_response",
    "load_corpus",
    "pack_examples",
    "pack_pairs",
    "plan_bins",
    "split_response",
    "synthetic_batch",
    "train_tokenizer",
]
