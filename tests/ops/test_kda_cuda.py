"""KDA's CUDA kernels, emulated on the CPU: around walks in float64 against the recurrence, and walks by themselves."""

import pytest
import torch
import torch.nn.functional as F

from perilune.errors import BackendError
from perilune.ops import SequenceLayout, kda
from perilune.ops.kda import cuda
from perilune.ops.kda.options import KdaInputs, KdaOptions
from tests.ops.cuda_emulator import has_compiler
from tests.ops.kda_cases import Case, as_dtype
from tests.ops.kda_triton_cases import PACKED, relative_error

pytestmark = [
    pytest.mark.skipif(not has_compiler(), reason="needs g++, which compiles the kernels for the CPU"),
    pytest.mark.usefixtures("emulated"),
]
BF16 = torch.bfloat16
LIMITS = {
    "o": 5e-3, "final_state": 5e-3, "dq": 8e-3, "dk": 8e-3, "dv": 8e-3, "dinitial_state": 8e-3, "dg": 2e-2,
    "dbeta": 2e-2, "ddt_bias": 8e-3, "dA_log": 2e-2,
}  # fmt: skip
WIDE = {"key_dim": 128, "value_dim": 128, "chunk_size": 64}
NARROW = {"key_dim": 64, "value_dim": 64, "chunk_size": 64}
CASES = {
    "raw, 128": Case(raw=True, lengths=(70, 0, 1), **WIDE),
    "bounded, grouped": Case(raw=True, lengths=(66,), heads=1, groups=2, lower_bound=-5.0, **WIDE),
    "bounded without a rate": Case(raw=True, lengths=(30, 65), heads=1, lower_bound=-1.0, **NARROW),
    "doubled beta, grouped, 64 x 128": Case(
        raw=True, lengths=(65,), heads=1, groups=2, key_dim=64, value_dim=128, chunk_size=64,
        switches={"allow_neg_eigval": True},
    ),
    "64 x 256": Case(lengths=(40,), heads=1, key_dim=64, value_dim=256, chunk_size=64),
    "operands, two heads": Case(lengths=(64, 15), scale=1.0, **NARROW),
    "no decay, identical keys": Case(gate="zero", keys="identical", lengths=(64,), heads=1, **NARROW),
    "steepest decay, repeated keys": Case(gate="hundred", keys="repeated", lengths=(65,), heads=1, **NARROW),
    "masks": Case(gate="masks_and_init", keys="correlated", beta=0.95, lengths=(65,), heads=1, **NARROW),
    "spikes": Case(gate="spiky", keys="some_zero", beta=2.0, lengths=(64,), heads=1, **WIDE),
    "steep decay, small raw keys": Case(
        gate="borderline", lengths=(66,), heads=1, switches={"qk_l2norm_in_kernel": True}, **WIDE
    ),
    "nothing written": Case(beta=0.0, lengths=(20,), heads=1, **NARROW),
}  # fmt: skip
BEYOND = {"no decay, identical keys": {"dv": 1.2e-2}}
"""Write keys nearly cancel there, and their operands are bfloat16 (docs/kernels.md)."""


def prepared(case, tensors, lengths_dtype=torch.int32):
    """Inputs, plan and options of a call, as the front door makes them."""
    pytest.importorskip("triton", reason="plans of chunks are with the Triton kernels, and triton is not installed")
    from perilune.ops.kda.triton.plan import plan_layout

    q, k, v, g, beta = (tensors[name].detach()[0] for name in PACKED)
    shape = (len(case.lengths), v.shape[1], q.shape[2], v.shape[2])
    state = tensors["initial_state"].detach() if case.state else torch.zeros(shape)
    parameters = (None if (x := tensors.get(name)) is None else x.detach().float() for name in ("A_log", "dt_bias"))
    inputs = KdaInputs(q, k, v, g, beta, *parameters, state.double())
    plan = plan_layout(SequenceLayout.from_lengths(case.lengths), 64, None)
    plan = plan._replace(cu_seqlens=plan.cu_seqlens.to(lengths_dtype))
    options = KdaOptions(
        scale=case.key_dim**-0.5 if case.scale is None else case.scale,
        lower_bound=case.lower_bound,
        gate_in_kernel=case.raw,
        qk_l2norm=case.switches.get("qk_l2norm_in_kernel", case.raw),
        beta_sigmoid=case.raw,
        allow_neg_eigval=case.switches.get("allow_neg_eigval", False),
        chunk_size=64,
        return_chunk_states=False,
        segment_chunks=None,
        in_cuda=True,
    )
    return inputs, plan, options


def with_an_unused_slot(plan):
    """As where only the device knows the lengths."""
    return plan._replace(sequences=torch.cat((plan.sequences, plan.sequences.new_full((1,), plan.num_sequences))))


def run_prepare(inputs, plan, options, for_backward=True):
    from perilune.ops.kda.triton.forward import Operands

    (heads, key_dim), slots = (inputs.v.shape[1], inputs.q.shape[2]), plan.num_slots

    def make(*shape, dtype=BF16):
        return torch.full((slots, heads, *shape), torch.nan, dtype=dtype)

    tiles = [make(64, key_dim) for _ in range(3)]
    squares = [make(64, 64), make(64, 64) if for_backward else torch.empty(0)]
    rest = [make(key_dim, dtype=torch.float32), make(4, 64, dtype=torch.float32), torch.empty(0)]
    operands = Operands(*tiles, *squares, *rest)
    cuda.prepare_chunks(inputs, plan, options, operands, for_backward)
    return operands


def chunks_of(plan, lengths):
    """Slot, first token, number of tokens and sequence of every chunk."""
    slot, start = 0, 0
    for sequence, length in enumerate(lengths):
        for first in range(0, length, 64):
            yield slot, start + first, min(64, length - first), sequence
            slot += 1
        start += length


def padded(x, first, count):
    """`[HV, 64, V]` in float64 of tokens of a chunk."""
    part = x[first : first + count].double()
    return torch.cat((part, part.new_zeros(64 - count, *part.shape[1:]))).transpose(0, 1)


def run_pipeline(case, tensors, seeds):
    """Outputs and gradients by both kernels and, between them, walks in float64 whose results are rounded as theirs."""
    from perilune.ops.kda.triton.gradients import KeyGradients, Saved

    inputs, plan, options = prepared(case, tensors, torch.int64 if len(case.lengths) > 1 else torch.int32)
    plan = with_an_unused_slot(plan)
    operands = run_prepare(inputs, plan, options)
    assert all(x[-1].isnan().all() for x in operands[:7]), "an unused slot was written"
    do, dfinal = seeds[0][0], seeds[1].double()
    tokens, heads, value_dim = inputs.v.shape
    key_dim, slots = inputs.q.shape[2], plan.num_slots
    o, z, dv = (torch.zeros(tokens, heads, value_dim, dtype=torch.float64) for _ in range(3))
    states, dstates = (torch.full((slots, heads, key_dim, value_dim), torch.nan, dtype=BF16) for _ in range(2))
    state, dstate = inputs.initial_state.clone(), dfinal.clone()
    read, key, write, mix, solve, decay = (x.double() for x in operands[:6])
    chunks = list(chunks_of(plan, case.lengths))
    for slot, first, count, sequence in chunks:
        states[slot] = state[sequence].to(BF16)
        wrong = padded(inputs.v, first, count) - key[slot] @ state[sequence]
        found = read[slot] @ state[sequence] + mix[slot] @ wrong
        o[first : first + count] = found.transpose(0, 1)[:count]
        z[first : first + count] = (solve[slot] @ wrong).transpose(0, 1)[:count]
        state[sequence] = decay[slot][..., None] * state[sequence] + write[slot].mT @ wrong
    for slot, first, count, sequence in reversed(chunks):
        dstates[slot] = dstate[sequence].to(BF16)
        pulled = padded(do, first, count)
        found = mix[slot].mT @ pulled + write[slot] @ dstate[sequence]
        dv[first : first + count] = found.transpose(0, 1)[:count]
        dstate[sequence] = decay[slot][..., None] * dstate[sequence] + read[slot].mT @ pulled - key[slot].mT @ found
    z, dv = z.to(BF16), dv.to(BF16)
    grams, along = (
        torch.full((slots, heads, 2, 64, 64), torch.nan, dtype=BF16),
        torch.full((slots, heads, 3, 64), torch.nan),
    )
    for slot, first, count, _ in chunks:
        do_, dv_, z_, o_, v_ = (padded(x, first, count) for x in (do, dv, z, o, inputs.v))
        for which, x in enumerate((do_, dv_)):
            later = (x @ z_.mT).tril(-1)
            grams[slot, :, which] = (later + later.mT).to(BF16)
        along[slot] = torch.stack([(do_ * z_).sum(-1), (do_ * o_).sum(-1), (dv_ * (2 * z_ - v_)).sum(-1)], 1).float()
    parts = key_dim // cuda.WARP_CHANNELS
    wide = torch.float32 if heads != inputs.q.shape[1] else inputs.q.dtype

    def make(*shape, dtype=torch.float32):
        return torch.full(shape, torch.nan, dtype=dtype)

    grads = KeyGradients(
        dq=make(tokens, heads, key_dim, dtype=wide),
        dk=make(tokens, heads, key_dim, dtype=wide),
        dg=make(tokens, heads, key_dim, dtype=inputs.g.dtype),
        dbeta=make(0 if options.beta_sigmoid else parts, tokens, heads),
        drate=make(slots, heads, parts),
        dbias=make(slots, heads, key_dim),
    )
    saved = Saved(operands, states, z, torch.empty(0))
    cuda.differentiate_chunks(do, dv, dstates, grams, along, saved, inputs, plan, options, grads)
    dq, dk = (x.unflatten(1, (inputs.q.shape[1], -1)).sum(2) for x in grads[:2])
    results = {"o": o, "final_state": state, "dq": dq, "dk": dk, "dv": dv, "dg": grads.dg, "dinitial_state": dstate}
    results |= {"dA_log": grads.drate.sum((0, 2)), "ddt_bias": grads.dbias.sum(0)} if case.raw else {}
    if case.beta == 0.0:
        results["dbeta"] = grads.dbeta.sum(0)
    return results


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, BF16) for name in CASES), *((name, torch.float16) for name in list(CASES)[:1])]
)
def test_the_kernels_make_the_recurrence_and_its_gradients(name, dtype):
    case = CASES[name]
    made = case.tensors()
    if name == "bounded without a rate":
        del made["A_log"]
    if name == "steep decay, small raw keys":
        made |= {x: made[x] * 1e-3 for x in ("q", "k")}
    tensors = {x: y.detach().to(dtype if x in PACKED else torch.float32) for x, y in made.items()}
    if name == "operands, two heads":
        tensors |= {x: tensors[x].float() for x in ("g", "beta")}
    exact = as_dtype(tensors, torch.float64)
    o, final_state = kda(**exact, **case.options(), backend="reference")
    generator = torch.Generator().manual_seed(1)
    seeds = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(dtype) for x in (o, final_state)]
    grads = torch.autograd.grad((o, final_state), list(exact.values()), [x.double() for x in seeds])
    wanted = {"o": o.detach(), "final_state": final_state.detach()}
    wanted |= {f"d{x}": grad for x, grad in zip(exact, grads, strict=True)}
    found = run_pipeline(case, tensors, seeds)
    errors = {}
    for x in wanted.keys() & found.keys():
        want = wanted[x][0] if x == "o" or x[1:] in PACKED else wanted[x]
        errors[x] = relative_error(found[x], want)
    limits = LIMITS | BEYOND.get(name, {})
    beyond = {x: f"{error:.1e}" for x, error in errors.items() if not error < limits[x]}
    assert not beyond, errors
    assert len(errors) >= 6


def test_tokens_after_a_row_change_no_bit_of_its_operands():
    case = CASES["raw, 128"]
    tensors, others = (
        {x: y.detach().to(BF16 if x in PACKED else torch.float32) for x, y in case.tensors(seed=seed).items()}
        for seed in (0, 5)
    )
    cut = 37
    mixed = tensors | {x: torch.cat((tensors[x][:, :cut], others[x][:, cut:]), 1) for x in PACKED}
    before, after = (run_prepare(*prepared(case, x)) for x in (tensors, mixed))
    for name in ("read", "key"):
        x, y = getattr(before, name)[0], getattr(after, name)[0]
        assert torch.equal(x[:, :cut], y[:, :cut]), name
        assert not torch.equal(x, y), name
    for name in ("mix", "solve"):
        x, y = getattr(before, name)[0], getattr(after, name)[0]
        assert torch.equal(x[:, :cut, :cut], y[:, :cut, :cut]), name
        assert not x[:, :cut, cut:].any(), name


def test_without_a_backward_nothing_is_written_for_it():
    case = CASES["operands, two heads"]
    tensors = {x: y.detach().to(BF16 if x in PACKED else torch.float32) for x, y in case.tensors().items()}
    call = prepared(case, tensors)
    whole, lean = run_prepare(*call), run_prepare(*call, for_backward=False)
    assert all(torch.equal(x, y) for x, y in zip(whole[:4], lean[:4], strict=True))
    assert torch.equal(whole.decay, lean.decay)
    assert lean.gain.isnan().all()
    assert not whole.gain.isnan().any()


def test_rows_that_are_apart_and_misaligned_are_read_right():
    case = CASES["operands, two heads"]
    tensors = {x: y.detach().to(BF16 if x in PACKED else torch.float32) for x, y in case.tensors().items()}
    inputs, plan, options = prepared(case, tensors)
    apart = [
        torch.empty(len(x), 1 + x[0].numel(), dtype=x.dtype)[:, 1:].copy_(x.flatten(1)).view_as(x) for x in inputs[:4]
    ]
    found = run_prepare(inputs._replace(q=apart[0], k=apart[1], g=apart[3]), plan, options)
    wanted = run_prepare(inputs, plan, options)
    assert all(torch.equal(x, y) for x, y in zip(found[:7], wanted[:7], strict=True))


WALKS = [
    ((70, 0, 1), 128, 128, BF16, torch.int32),
    ((200,), 64, 64, torch.float16, torch.int32),
    ((64, 130), 64, 128, BF16, torch.int64),
    ((70, 1), 64, 256, BF16, torch.int32),
]
WRITTEN = [
    (True, False, None),
    (True, True, BF16),
    (True, False, BF16),
    (True, False, torch.float32),
    (False, True, BF16),
]
"""Whether outputs and corrections are written, and the dtype of the states that are; last, what a backward wants."""
ALL = [(WALKS[0], written) for written in WRITTEN]
ALL += [(WALKS[1], WRITTEN[0]), (WALKS[2], WRITTEN[1]), (WALKS[3], WRITTEN[2]), (WALKS[1], WRITTEN[3])]
ALL += [(WALKS[2], WRITTEN[4]), (WALKS[3], WRITTEN[4])]
"""What is written does not depend on widths: all of it for the first, a part for each of the others."""


def make_walk(lengths, key_dim, value_dim, dtype, lengths_dtype):
    """Random operands of two heads, whose states neither vanish nor grow."""
    pytest.importorskip("triton", reason="plans of chunks are with the Triton kernels, and triton is not installed")
    from perilune.ops.kda.triton.forward import Operands
    from perilune.ops.kda.triton.plan import plan_layout

    plan = plan_layout(SequenceLayout.from_lengths(lengths), 64, None)
    plan = plan._replace(cu_seqlens=plan.cu_seqlens.to(lengths_dtype))
    generator = torch.Generator().manual_seed(0)

    def make(*shape, size=1.0, dtype=BF16):
        return (torch.randn(shape, generator=generator) * size).to(dtype)

    lead = (plan.num_slots, 2)
    tiles = [make(*lead, 64, key_dim, size=key_dim**-0.5) for _ in range(3)]
    squares = [make(*lead, 64, 64, size=0.1) for _ in range(2)]
    decay = torch.rand(*lead, key_dim, generator=generator)
    for slot, _, count, _ in chunks_of(plan, lengths):
        for x in (*tiles, *squares):
            x[slot, :, count:] = 0
    operands = Operands(*tiles, *squares, decay, torch.empty(0), torch.empty(0))
    tokens = sum(lengths)
    values = [make(tokens, 2, value_dim, dtype=dtype) for _ in range(2)]
    ends = [make(len(lengths), 2, key_dim, value_dim, dtype=torch.float32) for _ in range(2)]
    return plan, operands, *values, *ends


@pytest.mark.parametrize(
    ("lengths", "key_dim", "value_dim", "dtype", "lengths_dtype", "has_outputs", "has_corrections", "kept"),
    [(*walk, *written) for walk, written in ALL],
)
def test_the_walk_follows_its_equations(
    lengths, key_dim, value_dim, dtype, lengths_dtype, has_outputs, has_corrections, kept
):
    plan, operands, v, _, state, _ = make_walk(lengths, key_dim, value_dim, dtype, lengths_dtype)

    def empty(*shape, dtype=BF16):
        return torch.full(shape, torch.nan, dtype=dtype)

    count = 0 if kept is None else plan.num_slots
    states = empty(count, 2, key_dim, value_dim, dtype=kept or BF16)
    final = torch.full_like(state, torch.nan)
    o = empty(*v.shape, dtype=dtype) if has_outputs else torch.empty(0, dtype=dtype)
    z = empty(*v.shape) if has_corrections else torch.empty(0)
    padded_v = torch.full((len(v), 2, value_dim + 8), torch.nan, dtype=dtype)
    strided = padded_v.flatten(1)[:, : 2 * value_dim].copy_(v.flatten(1)).unflatten(1, (2, value_dim))
    cuda.walk_chunks(operands, strided, state, o, z, final, states, plan)
    read, key, write, mix, solve, decay = (x.double() for x in operands[:6])
    exact = state.double()
    for slot, first, length, sequence in chunks_of(plan, lengths):
        if kept is not None:
            assert relative_error(states[slot], exact[sequence]) < 5e-3
        wrong = padded(v, first, length) - key[slot] @ exact[sequence]
        wanted = read[slot] @ exact[sequence] + mix[slot] @ wrong
        rows = slice(first, first + length)
        if has_outputs:
            assert relative_error(o[rows], wanted.transpose(0, 1)[:length]) < 6e-3
        if has_corrections:
            assert relative_error(z[rows], (solve[slot] @ wrong).transpose(0, 1)[:length]) < 6e-3
        exact[sequence] = decay[slot][..., None] * exact[sequence] + write[slot].mT @ wrong
    assert relative_error(final, exact) < 5e-3


@pytest.mark.parametrize(("lengths", "key_dim", "value_dim", "dtype", "lengths_dtype"), WALKS)
def test_the_walk_back_follows_its_equations(lengths, key_dim, value_dim, dtype, lengths_dtype):
    plan, operands, _, do, _, dstate = make_walk(lengths, key_dim, value_dim, dtype, lengths_dtype)
    dv = torch.full(do.shape, torch.nan, dtype=BF16)
    dstates = torch.full((plan.num_slots, 2, key_dim, value_dim), torch.nan, dtype=BF16)
    exact, dinitial = dstate.double(), dstate.clone()
    cuda.walk_chunks_back(operands, do, dv, dinitial, dinitial, dstates, plan)
    read, key, write, mix, _, decay = (x.double() for x in operands[:6])
    for slot, first, length, sequence in reversed(list(chunks_of(plan, lengths))):
        assert relative_error(dstates[slot], exact[sequence]) < 5e-3
        pulled = padded(do, first, length)
        wanted = mix[slot].mT @ pulled + write[slot] @ exact[sequence]
        assert relative_error(dv[first : first + length], wanted.transpose(0, 1)[:length]) < 6e-3
        exact[sequence] = decay[slot][..., None] * exact[sequence] + read[slot].mT @ pulled - key[slot].mT @ wanted
    assert relative_error(dinitial, exact) < 5e-3


@pytest.mark.parametrize("log_rate", [-7.0, 0.0, 9.0])
def test_gates_of_any_size_decay_as_their_softplus_says(log_rate):
    case = Case(raw=True, lengths=(64,), heads=1, **NARROW)
    tensors = {x: y.detach().to(BF16 if x in PACKED else torch.float32) for x, y in case.tensors().items()}
    z = torch.linspace(-30, 130, 64).to(BF16)
    tensors |= {
        "g": z.expand(1, 64, 1, 64).contiguous(),
        "dt_bias": torch.zeros(1, 64),
        "A_log": torch.full((1,), log_rate),
    }
    decay = run_prepare(*prepared(case, tensors)).decay[0, 0].double()
    wanted = -64 * torch.tensor(log_rate).double().exp() * F.softplus(z.double())
    is_seen = wanted > -80
    assert is_seen.sum() > 5
    torch.testing.assert_close(decay.log()[is_seen], wanted[is_seen], atol=1e-5, rtol=1e-4)
    assert not decay[wanted < -110].any()


@pytest.mark.parametrize(("q_size", "k_size"), [(2.0**31, 1e19), (1e-12, 1e-12), (1e19, 1e-30)])
def test_unit_vectors_of_raw_ones_of_any_size_are_finite(q_size, k_size):
    case = Case(raw=True, lengths=(66,), heads=1, **NARROW)
    tensors = {x: y.detach().to(BF16 if x in PACKED else torch.float32) for x, y in case.tensors().items()}
    tensors |= {"q": tensors["q"] * q_size, "k": tensors["k"] * k_size}
    assert all(tensors[x].isfinite().all() for x in "qk")
    operands = run_prepare(*prepared(case, tensors))
    for name, x in operands._asdict().items():
        assert x.isfinite().all(), name


def test_calls_that_the_kernels_do_not_take_are_refused_with_the_reason():
    case = Case(**NARROW)
    with pytest.raises(BackendError, match="'cuda' needs tensors on a GPU, got cpu; use 'triton' or 'torch'"):
        kda(**as_dtype(case.tensors(), BF16), **case.options(), backend="cuda")
