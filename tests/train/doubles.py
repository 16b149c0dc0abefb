"""A causal language model of a hundred parameters and other small things, for what does not need real ones."""

import torch
from torch import Tensor, nn

from perilune.data import IGNORE_INDEX, Batch
from perilune.ops import SequenceLayout, as_layout

VOCAB = 11


class TinyModel(nn.Module):
    """h_t = W * mean of the embeddings of the tokens up to t, within each sequence."""

    def __init__(self, seed: int = 0, width: int = 6, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embedding = nn.Parameter(torch.randn(VOCAB, width, generator=generator, dtype=dtype))
        self.mix = nn.Parameter(torch.randn(width, width, generator=generator, dtype=dtype))
        self.output_weight = nn.Parameter(torch.randn(VOCAB, width, generator=generator, dtype=dtype))

    def hidden(
        self, tokens: Tensor, cu_seqlens: Tensor | SequenceLayout, *, prompt_lengths: Tensor | None = None
    ) -> Tensor:
        layout = as_layout(cu_seqlens, tokens)
        parts = self.embedding[tokens].split(list(layout.lengths))
        means = [part.cumsum(0) / torch.arange(1, len(part) + 1)[:, None] for part in parts]
        return torch.cat(means) @ self.mix


def make_batch(lengths: list[int], seed: int = 0, masked: float = 0.3, *, weighted: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    targets = torch.randint(VOCAB, (total,), generator=generator)
    targets[torch.rand(total, generator=generator) < masked] = IGNORE_INDEX
    weights = torch.randint(0, 4, (total,), generator=generator) / 2 if weighted else None
    return Batch(
        tokens=torch.randint(VOCAB, (total,), generator=generator),
        cu_seqlens=torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32),
        targets=targets,
        weights=weights,
    )


def some_tensors(step: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(step)
    return {
        "model": {
            "weight": torch.randn(5, 3, generator=generator),
            "half": torch.randn(7, generator=generator).bfloat16(),
            "scalar": torch.tensor(2.5, dtype=torch.float64),
            "empty": torch.empty(0, 4),
            "mask": torch.tensor([True, False, True]),
            "strided": torch.randn(4, 6, generator=generator)[:, ::2].T,
        },
        "optimizer": {"state.0.step": torch.tensor(3), "state.0.exp_avg": torch.randn(5, 3, generator=generator)},
    }
