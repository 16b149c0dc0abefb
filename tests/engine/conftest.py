"""A recurrent model small enough to follow by hand, with the interface that the engine uses.

Its hidden state after each token depends on every token before it, so a cache that loses, mixes or misplaces a row
changes what is sampled.
"""

import pytest
import torch
from torch import nn

from perilune.nn import HybridCache, StateEntry
from perilune.ops.layout import as_layout


class RecurrentModel(nn.Module):
    def __init__(self, vocab_size=23, d_model=16, seed=0, spread=1.5):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embedding = nn.Parameter(torch.randn(vocab_size, d_model, generator=generator))
        self.mix = nn.Parameter(torch.randn(d_model, d_model, generator=generator) / d_model**0.5)
        self.output_weight = nn.Parameter(torch.randn(vocab_size, d_model, generator=generator) * spread)
        self.dropout = nn.Dropout(0.5)
        self.calls = []

    def new_cache(self, num_sequences):
        state = StateEntry(state=torch.zeros(num_sequences, self.mix.shape[0]))
        return HybridCache([state], torch.zeros(num_sequences, dtype=torch.int64))

    def logits(self, hidden):
        return nn.functional.linear(hidden, self.output_weight)

    def hidden(self, tokens, cu_seqlens, cache=None, *, prompt_lengths=None):
        layout = as_layout(cu_seqlens, tokens)
        self.calls.append(layout.lengths)
        states = (cache or self.new_cache(layout.num_sequences)).entries[0]["state"]
        outputs, last = [], []
        for row, (start, length) in enumerate(zip(layout.starts, layout.lengths, strict=True)):
            state = states[row]
            for token in tokens[start : start + length]:
                state = torch.tanh(self.embedding[token] + state @ self.mix)
                outputs.append(self.dropout(state))
            last.append(state)
        if cache is not None:
            cache.entries[0]["state"] = torch.stack(last)
        return torch.stack(outputs)


@pytest.fixture
def recurrent_model():
    return RecurrentModel


@pytest.fixture
def model():
    return RecurrentModel()
