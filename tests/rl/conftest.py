"""A bigram policy and a task that it can learn in seconds: answer prompt token p with p + 8 at once."""

import pytest
import torch
from torch import nn

from perilune.engine import Engine
from perilune.nn import HybridCache
from perilune.ops import as_layout
from perilune.rl import NativeRolloutEngine, Prompt, Score

VOCAB = 24


class BigramModel(nn.Module):
    """The hidden state is the embedding of the current token."""

    def __init__(self, seed=0, dtype=torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embedding = nn.Parameter(torch.randn(VOCAB, 32, generator=generator).to(dtype))
        self.output_weight = nn.Parameter((torch.randn(VOCAB, 32, generator=generator) * 0.05).to(dtype))

    def new_cache(self, num_sequences):
        return HybridCache([], torch.zeros(num_sequences, dtype=torch.int64))

    def logits(self, hidden):
        return nn.functional.linear(hidden, self.output_weight)

    def hidden(self, tokens, cu_seqlens, cache=None, *, prompt_lengths=None):
        as_layout(cu_seqlens, tokens)
        return self.embedding[tokens]


def score_first_token(prompt, token_ids):
    return Score(reward=float(token_ids[0] == prompt.token_ids[-1] + 8))


@pytest.fixture
def make_model():
    return BigramModel


@pytest.fixture
def prompts():
    return [Prompt(id=f"p{token}", token_ids=(1, token), problem=None) for token in range(2, 10)]


@pytest.fixture
def scorer():
    return score_first_token


@pytest.fixture
def native():
    return lambda model, **options: NativeRolloutEngine(Engine(model, **options))
