"""Cases of the Triton backend that its interpreter runs; `python -m tests.ops.kda_triton_cases` checks them all.

Run with TRITON_INTERPRET=1; names of `SECTIONS` as arguments choose among them. Operands are float32: the interpreter
multiplies no bfloat16.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from perilune.ops import SequenceLayout, kda
from tests.ops.kda_cases import Case, as_dtype, outputs_and_gradients

PACKED = ("q", "k", "v", "g", "beta")
ROUNDING = 1e-5
CASES = {
    "a ragged pack with empty sequences": Case(lengths=(40, 0, 1, 33), chunk_size=32, key_dim=24, value_dim=20),
    "raw inputs": Case(raw=True, state=False, heads=1),
    "bounded gate, grouped values": Case(raw=True, lower_bound=-5.0, groups=2, lengths=(17,)),
    "negative eigenvalues, chunks of 64": Case(
        raw=True, switches={"allow_neg_eigval": True}, chunk_size=64, lengths=(65, 70), heads=1
    ),
    "extreme gates": Case(gate="hundred", heads=1),
    "masks, identical keys": Case(gate="masks_and_init", keys="identical", chunk_size=64, lengths=(100,), heads=1),
    "spiky gates, correlated keys": Case(gate="spiky", keys="correlated", beta=0.95, heads=1),
    "nothing written": Case(beta=0.0, keys="some_zero", heads=1),
    "one token": Case(lengths=(1,), scale=1.0),
}
SEGMENTED = {
    "a ragged pack, grouped values": (Case(raw=True, lengths=(40, 0, 1, 17), groups=2, heads=1, value_dim=20), 1),
    "slow decay": (Case(lengths=(16, 100), gate="tiny", beta=0.5, heads=1), 3),
    "no decay, identical keys": (Case(gate="zero", keys="identical", lengths=(55,), heads=1, key_dim=24), 1),
    "extreme gates": (Case(gate="hundred", lengths=(40,), heads=1), 1),
    "bounded gate, negative eigenvalues": (
        Case(
            raw=True,
            lower_bound=-0.1,
            switches={"allow_neg_eigval": True},
            lengths=(70, 17),
            heads=1,
            state=False,
        ),
        2,
    ),
}
"""With the chunks of their segments."""
LIMITS = {"masks, identical keys": 5e-5, "negative eigenvalues, chunks of 64": 5e-5}


def relative_error(found: Tensor, wanted: Tensor, floor: float = 1e-6) -> float:
    """Of norms; what ought to be zero may be off by `floor`. NaN, which `max` would pass by, is infinitely far off."""
    found, wanted = found.double(), wanted.double()
    if not (found.isfinite().all() and wanted.isfinite().all()):
        return float("inf")
    if wanted.norm() < 1e-12:
        return 0.0 if found.norm() < floor else float("inf")
    return float((found - wanted).norm() / wanted.norm())


def relative_errors(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    return {name: relative_error(found[name], wanted[name]) for name in wanted}


def edited_after(cut: int, tensors: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leaves that are `tensors` up to token `cut` and `other` from there on."""
    mixed = {name: torch.cat((tensors[name][:, :cut], other[name][:, cut:]), 1) for name in PACKED}
    return {name: x.detach().clone().requires_grad_() for name, x in {**tensors, **mixed}.items()}


def check_prefix(case: Case, tensors: dict[str, Tensor], edited: dict[str, Tensor], cut: int, **changes: Any) -> None:
    """Up to `cut` outputs keep every bit, as do all gradients of a loss on them, which are zero after it."""
    results = []
    for inputs in (tensors, edited):
        o = kda(**inputs, **{**case.options(), "backend": "triton", **changes})[0][:, :cut]
        grads = torch.autograd.grad(o.square().sum(), list(inputs.values()))
        results.append({"o": o, **dict(zip(inputs, grads, strict=True))})
    before, after = results
    for name in before:
        assert torch.equal(before[name], after[name]), name
        assert name not in PACKED or before[name].any(), name
    assert not any(after[name][:, cut:].any() for name in PACKED)


def in_segments(case: Case, tensors: dict[str, Tensor], chunks: int | None, **changes: Any) -> dict[str, Tensor]:
    return outputs_and_gradients(case, tensors, backend="triton", segment_chunks=chunks, **changes)


def assert_close_to_the_reference(
    case: Case,
    tensors: dict[str, Tensor],
    limit: float = ROUNDING,
    segments: int | None = None,
    saves: tuple[bool, ...] = (False, True),
    **changes: Any,
) -> dict[str, Tensor]:
    """For each way of the backward to come by the states: computed again, or saved."""
    wanted = outputs_and_gradients(case, as_dtype(tensors, torch.float64), backend="reference", **changes)
    for save_states in saves:
        found = in_segments(case, tensors, segments, save_states=save_states, **changes)
        errors = relative_errors(found, wanted)
        assert all(error < limit for error in errors.values()), (case, save_states, errors)
    return found


def saves_of(number: int) -> tuple[bool, ...]:
    """Both ways for the first case of a table, which has all shapes; one or the other for those after it."""
    return (False, True) if number == 0 else (number % 2 == 0,)


def check_values_and_gradients() -> None:
    for number, (name, case) in enumerate(CASES.items()):
        tensors = as_dtype(case.tensors(), torch.float32)
        assert_close_to_the_reference(case, tensors, LIMITS.get(name, ROUNDING), saves=saves_of(number))


def check_without_tokens_states_pass_through() -> None:
    case = Case(lengths=(0, 0))
    tensors = as_dtype(case.tensors(), torch.float32)
    o, final_state = kda(**tensors, **case.options(), backend="triton")
    assert o.shape == (1, 0, 2, 8)
    assert torch.equal(final_state, tensors["initial_state"])
    seeds = [torch.ones_like(x) for x in (o, final_state)]
    grads = torch.autograd.grad((o, final_state), list(tensors.values()), seeds)
    assert [x.numel() for x in grads[:5]] == [0] * 5
    assert grads[5].eq(1).all()


def check_states_with_values_first() -> None:
    case = Case(raw=True, lengths=(20, 0, 13), switches={"state_v_first": True, "return_chunk_states": True})
    tensors = as_dtype(case.tensors(), torch.float32)
    tensors["initial_state"] = tensors["initial_state"].detach().transpose(2, 3).contiguous().requires_grad_()
    assert_close_to_the_reference(case, tensors, saves=(True,))
    found, wanted = (
        kda(**as_dtype(tensors, dtype), **case.options(), backend=backend)[2].detach()
        for backend, dtype in (("triton", torch.float32), ("reference", torch.float64))
    )
    assert found.shape == wanted.shape == (3, 2, 8, 16)
    assert relative_error(found, wanted) < ROUNDING


def check_uncovered_tokens() -> None:
    """Tokens after the last entry of a tensor of lengths are not touched: theirs are NaN here, their results zeros."""
    case, end = Case(raw=True, lengths=(20, 9, 11), heads=1), 29
    for dtype, save_states in ((torch.int32, False), (torch.int64, True)):
        tensors = {name: x.detach() for name, x in as_dtype(case.tensors(), torch.float32).items()}
        for name in PACKED:
            tensors[name][:, end:] = torch.nan
        tensors["initial_state"] = tensors["initial_state"][:2]
        leaves = as_dtype(tensors, torch.float32)
        cu_seqlens = torch.tensor([0, 20, end], dtype=dtype)
        found = assert_close_to_the_reference(case, leaves, saves=(save_states,), cu_seqlens=cu_seqlens)
        for name in ("o", "dq", "dk", "dv", "dg", "dbeta"):
            assert found[name][:, :end].any(), name
            assert not found[name][:, end:].any(), name


def check_chunk_states_of_covered_tokens() -> None:
    case = Case(lengths=(20, 9))
    tensors = {name: x.detach() for name, x in as_dtype(case.tensors(), torch.float32).items()}
    options = {**case.options(), "cu_seqlens": torch.tensor([0, 17, 18])}
    assert kda(**tensors, **options, return_chunk_states=True, backend="triton")[2].shape[0] == 2 + 1


def check_prefix_invariance() -> None:
    for case, cut in (
        (Case(raw=True, lengths=(75,), chunk_size=64, heads=1), 41),
        (Case(raw=True, lengths=(40,), lower_bound=-5.0, groups=2, heads=1), 32),
        (Case(lengths=(40,), gate="masks_and_init", heads=1), 17),
    ):
        tensors = as_dtype(case.tensors(), torch.float32)
        check_prefix(case, tensors, edited_after(cut, tensors, case.tensors(torch.float32, seed=9)), cut)


def check_a_batch_is_a_pack() -> None:
    case = Case(lengths=(19, 19))
    tensors = {name: x.detach() for name, x in as_dtype(case.tensors(), torch.float32).items()}
    packed = kda(**tensors, **case.options(), backend="triton")
    batch = {name: x.unflatten(1, (2, 19))[0] if name in PACKED else x for name, x in tensors.items()}
    batched = kda(**batch, **{**case.options(), "cu_seqlens": None}, backend="triton")
    assert torch.equal(batched[0].flatten(0, 1), packed[0][0])
    assert torch.equal(batched[1], packed[1])


def check_compiled_is_eager() -> None:
    """One walk and segments, in one graph: it is the compiler that takes long."""
    case = Case(raw=True, lengths=(20, 0, 1), heads=1)
    tensors = as_dtype(case.tensors(), torch.float32)

    def run(x: dict[str, Tensor]) -> list[Tensor]:
        calls = [kda(**x, **case.options(), segment_chunks=chunks, backend="triton") for chunks in (None, 1)]
        return [y for call in calls for y in call[:2]]

    results = []
    for call in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        outputs = call(tensors)
        grads = [torch.autograd.grad(x.square().sum(), list(tensors.values()), retain_graph=True) for x in outputs[::2]]
        results.append((*outputs, *(grad for each in grads for grad in each)))
    assert all(torch.equal(eager, compiled) for eager, compiled in zip(*results, strict=True))


def constants(case: Case, seed: int = 0) -> dict[str, Tensor]:
    return {name: x.detach() for name, x in case.tensors(torch.float32, seed).items()}


def check_segments_equal_the_reference() -> None:
    """They are taken: where anything is left to carry, not all bits are those of one walk."""
    for number, (name, (case, chunks)) in enumerate(SEGMENTED.items()):
        tensors = as_dtype(case.tensors(), torch.float32)
        found = assert_close_to_the_reference(case, tensors, segments=chunks, saves=saves_of(number))
        whole = kda(**constants(case), **case.options(), backend="triton")[0]
        assert relative_error(found["o"], whole) < ROUNDING, name
        assert torch.equal(found["o"], whole) == (case.gate == "hundred"), name


def check_one_segment_is_one_walk() -> None:
    """But for what the fold hands on."""
    case = Case(lengths=(40, 0, 17), heads=1)
    tensors = as_dtype(case.tensors(), torch.float32)
    found, whole = (in_segments(case, tensors, chunks) for chunks in (2**40, None))
    for name in whole.keys() - {"final_state", "dinitial_state"}:
        assert torch.equal(found[name], whole[name]), name
    assert max(relative_errors(found, whole).values()) < ROUNDING


def check_segments_see_no_later_token() -> None:
    case = Case(raw=True, lengths=(75,), heads=1)
    tensors = as_dtype(case.tensors(), torch.float32)
    edited = edited_after(41, tensors, case.tensors(torch.float32, seed=9))
    check_prefix(case, tensors, edited, 41, segment_chunks=2)
    options = {**case.options(), "segment_chunks": 2, "backend": "triton"}
    whole = kda(**constants(case), **options)[0]
    for cut in (16, 41, 64):
        parts = {name: x.detach()[:, :cut] if name in PACKED else x.detach() for name, x in tensors.items()}
        part = kda(**parts, **{**options, "cu_seqlens": SequenceLayout.from_lengths((cut,))})[0]
        assert torch.equal(part, whole[:, :cut]), cut


def check_segments_see_no_other_sequence() -> None:
    """Whoever stands beside it in the pack, and whatever: a sequence keeps its bits, gradients included."""
    case, alone = Case(lengths=(3, 50, 0, 60), heads=1), Case(lengths=(50,), heads=1)
    tensors = {name: x.detach().clone() for name, x in case.tensors(torch.float32).items()}
    cut = {name: x[:, 3:53] if name in PACKED else x[1:2] for name, x in tensors.items()}
    for name in PACKED:
        tensors[name][:, 53:] = torch.nan
    options = {"segment_chunks": 1, "chunk_size": 16, "backend": "triton", "output_final_state": True}
    results = []
    for x, lengths, own in ((tensors, case.lengths, 1), (cut, alone.lengths, 0)):
        leaves = as_dtype(x, torch.float32)
        o, final_state = kda(**leaves, **options, cu_seqlens=SequenceLayout.from_lengths(lengths))
        tokens = o.split(lengths, 1)[own]
        loss = tokens.square().sum() + final_state[own].square().sum()
        grads = torch.autograd.grad(loss, list(leaves.values()))
        parts = [grad.split(lengths, 1)[own] for grad in grads[:5]]
        results.append((tokens, final_state[own], *parts, grads[5][own]))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def check_a_split_at_a_segment_carries_the_state() -> None:
    case = Case(raw=True, lengths=(85,), lower_bound=-1.0, heads=1)
    tensors = constants(case)
    options = {**case.options(), "segment_chunks": 2, "backend": "triton"}
    whole, final_state = kda(**tensors, **options)
    state, parts = tensors["initial_state"], []
    for start, end in ((0, 64), (64, 85)):
        part = {name: x[:, start:end] if name in PACKED else x for name, x in tensors.items()}
        part["initial_state"] = state
        o, state = kda(**part, **{**options, "cu_seqlens": SequenceLayout.from_lengths((end - start,))})
        parts.append(o)
    assert torch.equal(torch.cat(parts, 1), whole)
    assert torch.equal(state, final_state)


def check_chunk_states_of_segments() -> None:
    case = Case(lengths=(50, 0, 33), switches={"return_chunk_states": True})
    tensors = as_dtype(case.tensors(), torch.float32)
    wanted = kda(**as_dtype(tensors, torch.float64), **case.options(), backend="reference")[2]
    found = kda(**tensors, **case.options(), segment_chunks=2, backend="triton")[2].detach()
    assert found.shape == wanted.shape == (4 + 3, 2, 16, 8)
    assert relative_error(found, wanted) < ROUNDING


def check_segments_of_uncovered_tokens() -> None:
    """Lengths stay on the device: the last segments may be empty, and tokens behind are neither read nor left."""
    case, end = Case(raw=True, lengths=(40, 9, 11)), 49
    tensors = constants(case)
    for name in PACKED:
        tensors[name][:, end:] = torch.nan
    tensors["initial_state"] = tensors["initial_state"][:2]
    leaves = as_dtype(tensors, torch.float32)
    cu_seqlens = torch.tensor([0, 40, end])
    found = assert_close_to_the_reference(case, leaves, saves=(False,), cu_seqlens=cu_seqlens, segments=1)
    for name in ("o", "dq", "dk", "dv", "dg", "dbeta"):
        assert not found[name][:, end:].any(), name
    nothing = {**case.options(), "cu_seqlens": torch.zeros(3, dtype=torch.int32), "segment_chunks": 1}
    o, final_state = kda(**tensors, **nothing, backend="triton")
    assert not o.any()
    assert torch.equal(final_state, tensors["initial_state"])


def check_memory_is_written_before_it_is_read() -> None:
    """Whatever is allocated is filled with NaN; deterministic algorithms also forbid anything that is not."""
    case = Case(raw=True, lengths=(40, 0, 17), heads=1)
    tensors = as_dtype(case.tensors(), torch.float32)
    plain = in_segments(case, tensors, 2)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        for save_states in (False, True):
            found = in_segments(case, tensors, 2, save_states=save_states)
            assert all(torch.equal(found[name], plain[name]) for name in plain)
    finally:
        torch.use_deterministic_algorithms(False)


SECTIONS = {
    "walks": (
        check_values_and_gradients,
        check_without_tokens_states_pass_through,
        check_states_with_values_first,
        check_uncovered_tokens,
        check_chunk_states_of_covered_tokens,
        check_prefix_invariance,
        check_a_batch_is_a_pack,
        check_compiled_is_eager,
    ),
    "segments": (
        check_segments_equal_the_reference,
        check_one_segment_is_one_walk,
        check_segments_see_no_later_token,
        check_segments_see_no_other_sequence,
        check_a_split_at_a_segment_carries_the_state,
        check_chunk_states_of_segments,
        check_segments_of_uncovered_tokens,
        check_memory_is_written_before_it_is_read,
    ),
}

if __name__ == "__main__":
    for section in sys.argv[1:] or SECTIONS:
        for check in SECTIONS[section]:
            check()
    print("equal")
