"""The serving step of a KDA layer: backends against the float64 reference, the pools, and the layer itself."""

import pytest
import torch

from perilune.errors import BackendError
from perilune.nn import KDAConfig, KimiDeltaAttention, initialize
from perilune.ops import SequenceLayout
from perilune.ops.kda_decode import _fits, kda_decode
from tests.ops.kda_decode_cases import GATES, copied, errors, make_inputs

TOKENS = ("qkv", "g", "beta", "z")
"""Arguments with a row for each sequence and token."""
SHAPES = [(3, 1, 2, 2, 16, 16), (3, 3, 2, 4, 16, 32), (2, 8, 1, 1, 24, 20), (1, 1, 3, 3, 8, 8)]


def rows_of(inputs, first, last):
    """The same call for tokens `first` to `last` of every sequence; pools are shared."""
    return {name: x[:, first:last] if name in TOKENS else x for name, x in inputs.items()}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("kept", [False, True])
def test_torch_equals_the_reference(shape, gate, kept):
    inputs = make_inputs(*shape, gated=shape[1] != 3, kept=kept)
    assert max(errors(inputs, "torch", **gate).values()) < 2e-6


def test_float64_is_not_rounded_on_the_way():
    inputs = copied(make_inputs(3, 2, 2, 4, 16, 16), torch.float64)
    assert max(errors(inputs, "auto").values()) < 1e-12


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_other_slots_and_skipped_sequences_are_untouched(backend):
    inputs = make_inputs(4, 2, 2, 2, 16, 16)
    inputs["slots"][1] = -1
    ours = copied(inputs)
    o = kda_decode(**ours, backend=backend)
    used = {slot for slot in inputs["slots"].tolist() if slot >= 0}
    for name in ("states", "conv_states"):
        for slot in range(6):
            assert torch.equal(ours[name][slot], inputs[name][slot]) == (slot not in used)
    assert not o[1].any()
    assert all(row.any() for place, row in enumerate(o) if place != 1)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_several_tokens_at_once_are_one_after_the_other(backend):
    inputs = make_inputs(2, 5, 1, 2, 16, 16)
    whole, steps = copied(inputs), copied(inputs)
    expected = kda_decode(**whole, backend=backend)
    for token in range(5):
        part = kda_decode(**rows_of(steps, token, token + 1), backend=backend)
        torch.testing.assert_close(part[:, 0], expected[:, token])
    torch.testing.assert_close(steps["states"], whole["states"])
    torch.testing.assert_close(steps["conv_states"], whole["conv_states"])


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_pools_hold_what_is_kept_and_outputs_are_given_for_all(backend):
    inputs = make_inputs(9, 4, 1, 2, 16, 16, kept=True)
    inputs["slots"][5] = -1
    ours, whole = copied(inputs), {**copied(inputs), "keep": None}
    torch.testing.assert_close(kda_decode(**ours, backend=backend), kda_decode(**whole, backend=backend))
    for row, (slot, keep) in enumerate(zip(inputs["slots"].tolist(), inputs["keep"].tolist(), strict=True)):
        if slot < 0:
            continue
        alone = copied(inputs)
        alone = {name: x[row : row + 1] if name in (*TOKENS, "slots") else x for name, x in alone.items()}
        if keep:
            kda_decode(**{**rows_of(alone, 0, keep), "keep": None}, backend=backend)
        for pool in ("states", "conv_states"):
            if keep:
                torch.testing.assert_close(ours[pool][slot], alone[pool][slot])
            else:
                assert torch.equal(ours[pool][slot], inputs[pool][slot])
    untouched = [slot for slot in range(11) if slot not in inputs["slots"].tolist()]
    assert all(torch.equal(ours[pool][untouched], inputs[pool][untouched]) for pool in ("states", "conv_states"))


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_keeping_all_tokens_is_the_ordinary_call(backend):
    inputs = make_inputs(4, 3, 2, 2, 16, 16)
    plain, every = copied(inputs), {**copied(inputs), "keep": torch.full((4,), 3)}
    assert torch.equal(kda_decode(**every, backend=backend), kda_decode(**plain, backend=backend))
    assert all(torch.equal(every[pool], plain[pool]) for pool in ("states", "conv_states"))


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("is_joint", [False, True])
def test_rejected_drafts_leave_no_trace(backend, is_joint):
    """Speculation with random acceptance gives each sequence the outputs of plain decoding.

    Either a draft is verified (keep 0) and its accepted tokens are committed by a second call, or every call starts
    with the accepted tokens of the draft before, which it commits, and goes on with the new draft.
    """
    length, draft, count = 14, 4, 3
    truth = make_inputs(count, length, 2, 2, 16, 16)
    plain, ours = copied(truth), copied(truth)
    expected = torch.cat([kda_decode(**rows_of(plain, t, t + 1), backend=backend) for t in range(length)], 1)
    wrong = make_inputs(count, length + draft, 2, 2, 16, 16, seed=1)
    generator = torch.Generator().manual_seed(3)
    done, pending = [0] * count, [0] * count
    while min(done) < length:
        right = torch.randint(1, draft + 1, (count,), generator=generator).tolist()
        right = [min(r, length - d) for r, d in zip(right, done, strict=True)]
        call = {**ours, "keep": torch.tensor(pending)}
        for name in TOKENS:
            window = wrong[name][:, : 2 * draft].clone()
            for row in range(count):
                start, stop = done[row] - pending[row], done[row] + right[row]
                window[row, : stop - start] = truth[name][row, start:stop]
            call[name] = window
        o = kda_decode(**call, backend=backend)
        for row in range(count):
            found = o[row, pending[row] : pending[row] + right[row]]
            torch.testing.assert_close(found, expected[row, done[row] : done[row] + right[row]])
        if is_joint:
            pending = right
        else:
            kda_decode(**{**call, "keep": torch.tensor(right)}, backend=backend)
        done = [d + r for d, r in zip(done, right, strict=True)]
    if is_joint:
        for name in TOKENS:
            for row in range(count):
                call[name][row, : pending[row]] = truth[name][row, length - pending[row] :]
        kda_decode(**{**call, "keep": torch.tensor(pending)}, backend=backend)
    torch.testing.assert_close(ours["states"], plain["states"])
    torch.testing.assert_close(ours["conv_states"], plain["conv_states"])


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_without_slots_sequence_i_owns_slot_i(backend):
    inputs = make_inputs(3, 2, 2, 2, 16, 16)
    inputs["slots"] = torch.arange(3)
    named, in_order = copied(inputs), {**copied(inputs), "slots": None}
    torch.testing.assert_close(kda_decode(**in_order, backend=backend), kda_decode(**named, backend=backend))
    for pool in ("states", "conv_states"):
        torch.testing.assert_close(in_order[pool], named[pool])
        assert torch.equal(in_order[pool][3:], inputs[pool][3:])


def test_it_is_what_the_layer_does_in_a_step_with_gradients():
    layer = KimiDeltaAttention(KDAConfig(num_heads=2, head_dim=16), 32)
    initialize(layer, seed=0)
    cache = layer.new_cache(3, "cpu", torch.float32)
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    layer(torch.cat((x, x, x)), SequenceLayout.from_lengths([3, 3, 3]), cache)
    conv, state = cache["conv"].clone(), cache["state"].clone()
    expected = layer(x, SequenceLayout.from_lengths([1, 1, 1]), cache)
    with torch.no_grad():
        qkv, raw, beta, z = layer._project(x)
        o = kda_decode(
            qkv[:, None], raw[:, None], beta[:, None], z.view(3, 1, 2, 16), conv, state,
            conv_weight=layer.conv.weight, norm_weight=layer.o_norm.weight, A_log=layer.A_log, dt_bias=layer.dt_bias,
            norm_eps=layer.config.norm_eps,
        )  # fmt: skip
        torch.testing.assert_close(layer.o_proj(o[:, 0].flatten(1)), expected)
    torch.testing.assert_close(state, cache["state"])
    torch.testing.assert_close(conv, cache["conv"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"qkv": torch.zeros(3, 9, 96)}, "1 to 8 tokens a sequence, got L=9"),
        ({"qkv": torch.zeros(3, 1, 95)}, "width 95, which is not 2 H K"),
        ({"beta": torch.zeros(3, 1, 3)}, r"beta must have shape \[3, 1, 2\]"),
        ({"slots": torch.zeros(3)}, "slots must be int32 or int64"),
        ({"slots": None, "states": torch.zeros(2, 2, 16, 16), "conv_states": torch.zeros(2, 96, 3)}, "3 sequences but"),
        ({"keep": torch.zeros(2, dtype=torch.int32)}, r"keep must have shape \[3\]"),
        ({"keep": torch.zeros(3)}, "keep must be int32 or int64"),
        ({"keep": torch.tensor([0, 1, 2])}, r"keep must be in \[0, 1\], got \[0, 1, 2\]"),
        ({"states": torch.zeros(5, 2, 16, 32)[..., ::2]}, "states is updated in place and must be contiguous"),
        ({"lower_bound": -6.0}, "lower_bound must be in"),
        ({"z": torch.zeros(3, 1, 2, 16, device="meta")}, "z must be on qkv's device, cpu, got meta"),
        ({"slots": torch.zeros(3, dtype=torch.int32, device="meta")}, "slots must be on qkv's device, cpu, got meta"),
        ({"conv_weight": torch.zeros(96, 1)}, "W >= 2"),
    ],
)
def test_wrong_arguments_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        kda_decode(**{**make_inputs(3, 1, 2, 2, 16, 16), **change})


def test_no_sequences_at_all():
    inputs = {name: x[:0] if name in (*TOKENS, "slots") else x for name, x in make_inputs(2, 3, 1, 2, 8, 16).items()}
    for slots in (inputs["slots"], None):
        for keep in (inputs["slots"], None):
            assert kda_decode(**{**inputs, "slots": slots, "keep": keep}).shape == (0, 3, 2, 16)


@pytest.mark.parametrize(
    ("value_dim", "key_dim", "fits"),
    [(128, 128, True), (1, 64, True), (64, 256, True), (128, 129, False), (256, 256, False)],
)
def test_memories_that_would_spill_registers_do_not_go_to_the_kernel(value_dim, key_dim, fits):
    assert _fits(torch.empty(2, 4, value_dim, key_dim, device="meta")) == fits


def test_backends_that_cannot_serve_say_why(monkeypatch):
    inputs = make_inputs(1, 1, 1, 1, 8, 8)
    with pytest.raises(ValueError, match="must be 'auto', 'cuda', 'triton', 'torch' or 'reference', got 'gpu'"):
        kda_decode(**inputs, backend="gpu")
    with pytest.raises(BackendError, match=r"backend 'cuda' needs tensors on a GPU, got cpu; use 'auto'"):
        kda_decode(**inputs, backend="cuda")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(BackendError, match=r"takes float32, got torch\.float64|needs the package triton"):
        kda_decode(**copied(inputs, torch.float64), backend="triton")
