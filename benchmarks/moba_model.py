"""Prefill of a small model with MoBA layers, against the same weights with full attention."""

from __future__ import annotations

import torch
from harness import extra_bytes, spread, timed, write_result

from perilune.models import ModelConfig, build_model, parameter_counts, set_attention_mode
from perilune.nn.config import MoBAConfig
from perilune.ops import SequenceLayout
from perilune.seeding import make_generator

LENGTHS = (8192, 16384, 32768, 65536, 131072)
MODEL = ModelConfig(
    vocab_size=16384,
    d_model=1024,
    layers=("moba",) * 8,
    d_ff=2816,
    moba=MoBAConfig(num_heads=16, head_dim=64, moba_chunk_size=128, moba_topk=8),
    tie_embeddings=True,
)


def main(reps: int, name: str) -> int:
    """Time hidden states of one sequence of each length, full and MoBA in turns."""
    model = build_model(MODEL, seed=0).to("cuda", torch.bfloat16).eval()
    print(f"{parameter_counts(MODEL).total:,} parameters, bfloat16, one sequence, medians [p10 p90] of {reps} rounds")
    generator, record = make_generator(0, "moba", "model", device="cuda"), {}
    for length in LENGTHS:
        tokens = torch.randint(MODEL.vocab_size, (length,), generator=generator, device="cuda")
        layout = SequenceLayout.from_lengths([length], "cuda")

        def prefill(tokens: torch.Tensor = tokens, layout: SequenceLayout = layout) -> None:
            with torch.no_grad():
                model.hidden(tokens, layout)

        seconds: dict[str, list[float]] = {"full": [], "moba": []}
        memory = {}
        for turn in range(reps + 2):
            for mode, times in seconds.items():
                set_attention_mode(model, mode)
                if turn == 1:
                    memory[mode] = extra_bytes(prefill)
                took = timed(prefill, "cuda")
                if turn > 1:
                    times.append(took)
        ratio = spread(tuple(a / b for a, b in zip(seconds["full"], seconds["moba"], strict=True)))
        record[str(length)] = {
            **{mode: {**spread(tuple(times)), "extra_bytes": memory[mode]} for mode, times in seconds.items()},
            "full_over_moba": ratio,
        }
        medians = {mode: 1e3 * spread(tuple(times))["median"] for mode, times in seconds.items()}
        print(
            f"{length:8d} tokens: full {medians['full']:9.2f} ms, MoBA {medians['moba']:9.2f} ms, "
            f"{ratio['median']:.2f}x [{ratio['p10']:.2f} {ratio['p90']:.2f}]",
            flush=True,
        )
    print(write_result(name, {"device": torch.cuda.get_device_name(), "lengths": record}))
    return 0
