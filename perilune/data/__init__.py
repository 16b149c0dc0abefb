"""Tokenizers, chat templates, corpora, packed batches and their sources."""

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
from perilune.data.chat_encoding import encode_chat
from perilune.data.chat_messages import normalize_messages
from perilune.data.chat_template import KIMI_K2_TEMPLATE, PERILUNE_TEMPLATE, ChatTemplate
from perilune.data.gguf_text import gguf_template, gguf_tokenizer
from perilune.data.hf_tokenizer import HFTokenizer
from perilune.data.kimi_tokenizer import KimiTokenizer
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
    NeedleConfig,
    PalindromeConfig,
    RecallConfig,
    StackConfig,
    SyntheticConfig,
    SyntheticSource,
    synthetic_batch,
)
from perilune.data.text_tokenizer import TextTokenizer, load_tokenizer
from perilune.data.tokenizer import MIN_VOCAB_SIZE, SPECIAL_TOKENS, Tokenizer, bits_per_byte, train_tokenizer
from perilune.data.tokenizer_export import tokenizer_files, without_missing_code

__all__ = [
    "IGNORE_INDEX",
    "KIMI_K2_TEMPLATE",
    "MIN_VOCAB_SIZE",
    "PERILUNE_TEMPLATE",
    "SPECIAL_TOKENS",
    "Batch",
    "BatchSource",
    "ChatTemplate",
    "ConversationSource",
    "CopiesConfig",
    "Corpus",
    "CorpusConfig",
    "DrawSource",
    "EmbeddedCorpusConfig",
    "Example",
    "FilesCorpusConfig",
    "HFTokenizer",
    "KimiTokenizer",
    "Message",
    "MixtureSource",
    "NeedleConfig",
    "PalindromeConfig",
    "PreferencePair",
    "PreferenceSource",
    "RecallConfig",
    "StackConfig",
    "SyntheticConfig",
    "SyntheticSource",
    "TextTokenizer",
    "Tokenizer",
    "WindowSource",
    "apportion",
    "bits_per_byte",
    "check_corpus",
    "compression_baselines",
    "concat_batches",
    "encode_chat",
    "encode_conversation",
    "encode_documents",
    "encode_prompt",
    "encode_response",
    "gguf_template",
    "gguf_tokenizer",
    "load_corpus",
    "load_tokenizer",
    "normalize_messages",
    "pack_examples",
    "pack_pairs",
    "plan_bins",
    "split_response",
    "synthetic_batch",
    "tokenizer_files",
    "train_tokenizer",
    "without_missing_code",
]
