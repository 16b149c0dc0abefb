"""What every token mixer promises; a new row of MIXERS needs only a configuration in helpers.CONFIGS."""

import pytest
import torch

from perilune.nn import MIXERS, MatrixLayout, QKClipSpec
from perilune.nn.roles import DeclaresAdamW, DeclaresMatrices
from perilune.ops.layout import SequenceLayout
from tests.nn.helpers import CONFIGS, D_MODEL, kind_of, make_mixer, packed_input, run_pieces, split_packed

LENGTHS = (5, 0, 19, 1)
TIGHT = {"rtol": 1e-10, "atol": 1e-11}

every_mixer = pytest.mark.parametrize("name", CONFIGS)


def test_every_registered_mixer_is_tested():
    assert {kind_of(name) for name in CONFIGS} == set(MIXERS)


@every_mixer
def test_packed_equals_one_sequence_at_a_time(name):
    mixer = make_mixer(name)
    x, layout = packed_input(LENGTHS)
    alone = [mixer(part, SequenceLayout.from_lengths([part.shape[0]])) for part in split_packed(x, LENGTHS)]
    torch.testing.assert_close(mixer(x, layout), torch.cat(alone), **TIGHT)


@every_mixer
def test_training_may_follow_generation_with_the_same_lengths(name):
    mixer = make_mixer(name)
    lengths = (7, 31, 2, 13)  # of no other test: whatever is remembered by layout is made here first
    x, layout = packed_input(lengths)
    with torch.inference_mode():
        mixer(x, layout)
    x = x.clone().requires_grad_()
    mixer(x, SequenceLayout.from_lengths(lengths)).square().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@every_mixer
def test_permuting_sequences_permutes_results(name):
    mixer = make_mixer(name)
    x, layout = packed_input(LENGTHS)
    order = [2, 3, 0, 1]
    parts = split_packed(x, LENGTHS)
    y = mixer(torch.cat([parts[i] for i in order]), SequenceLayout.from_lengths([LENGTHS[i] for i in order]))
    expected = split_packed(mixer(x, layout), LENGTHS)
    torch.testing.assert_close(y, torch.cat([expected[i] for i in order]), **TIGHT)


@every_mixer
def test_later_tokens_do_not_change_earlier_outputs(name):
    mixer = make_mixer(name)
    x, layout = packed_input((23,))
    changed = x.clone()
    changed[11:] += 1
    before, after = mixer(x, layout), mixer(changed, layout)
    torch.testing.assert_close(after[:11], before[:11], **TIGHT)
    assert not torch.allclose(after[11:], before[11:])


@every_mixer
@pytest.mark.parametrize("with_grad", [False, True])
def test_prefill_chunked_prefill_and_decode_agree(name, with_grad):
    mixer = make_mixer(name)
    lengths = (6, 5, 21)
    x, layout = packed_input(lengths)
    sequences = split_packed(x, lengths)
    with torch.set_grad_enabled(with_grad):
        expected = split_packed(mixer(x, layout), lengths)
        schedules = [
            [lengths],
            [(1, 0, 16), (0, 5, 1), (5, 0, 4)],
            [(3, 2, 18), *[(1, 1, 1)] * 3],
            [(1, 1, 1)] * 5,
        ]
        for pieces in schedules:
            found, _ = run_pieces(mixer, sequences, pieces)
            for y, full in zip(found, expected, strict=True):
                torch.testing.assert_close(y.detach(), full[: y.shape[0]].detach(), **TIGHT)


@every_mixer
def test_cache_rows_are_independent(name):
    mixer = make_mixer(name)
    x, _ = packed_input((4, 7, 2))
    sequences = split_packed(x, (4, 7, 2))
    with torch.no_grad():
        _, cache = run_pieces(mixer, sequences, [(4, 7, 2)])
        index = torch.tensor([2, 1, 1])
        picked = cache.select(index)
        token, _ = packed_input((1, 1, 1), seed=3)
        step = SequenceLayout.from_lengths([1, 1, 1])
        y = mixer(token[index], step, picked)
        expected = mixer(token, step, cache)
    torch.testing.assert_close(y, expected[index], **TIGHT)


@every_mixer
def test_every_mixer_may_be_told_where_prompts_end(name):
    """And configurations of these tests mix prompt and response alike."""
    mixer = make_mixer(name)
    x, layout = packed_input(LENGTHS)
    told = mixer(x, layout, None, torch.tensor([2, 0, 11, 1]))
    torch.testing.assert_close(told, mixer(x, layout), **TIGHT)


@every_mixer
def test_cache_of_other_size_is_refused(name):
    mixer = make_mixer(name)
    x, layout = packed_input((2, 2))
    with pytest.raises(ValueError, match="cu_seqlens has 2 sequences but the cache has 3 rows"):
        mixer(x, layout, mixer.new_cache(3, "cpu", torch.float64))


@every_mixer
def test_no_tokens_at_all(name):
    mixer = make_mixer(name)
    for lengths in ((), (0, 0)):
        x, layout = packed_input(lengths)
        assert mixer(x, layout).shape == (0, D_MODEL)
        assert mixer(x, layout, mixer.new_cache(len(lengths), "cpu", torch.float64)).shape == (0, D_MODEL)


@every_mixer
def test_gradients_reach_every_parameter(name):
    mixer = make_mixer(name)
    x, layout = packed_input(LENGTHS)
    mixer(x.requires_grad_(), layout).square().sum().backward()
    for label, parameter in [("x", x), *mixer.named_parameters()]:
        assert parameter.grad is not None, label
        assert torch.isfinite(parameter.grad).all(), label
        assert parameter.grad.abs().sum() > 0, label


@every_mixer
def test_float32_is_close_to_float64(name):
    x, layout = packed_input(LENGTHS)
    exact = make_mixer(name)(x, layout)
    found = make_mixer(name, torch.float32)(x.float(), layout)
    assert (found - exact).norm() <= 1e-5 * exact.norm()


@every_mixer
def test_bfloat16_autocast_is_close(name):
    mixer = make_mixer(name, torch.float32)
    x, layout = packed_input(LENGTHS, dtype=torch.float32)
    exact = mixer(x, layout)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = mixer(x, layout)
        cache = mixer.new_cache(len(LENGTHS), "cpu", torch.float32)
        prefilled = mixer(x, layout, cache)
        step = mixer(x[: len(LENGTHS)], SequenceLayout.from_lengths([1] * len(LENGTHS)), cache)
    y.float().sum().backward()
    # a handful of bfloat16 roundings, 2^-9 each, of terms that partly cancel
    assert (y.float() - exact).norm() <= 0.03 * exact.norm()
    torch.testing.assert_close(prefilled, y)
    assert torch.isfinite(step).all()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in mixer.parameters())


@every_mixer
def test_half_precision_keeps_named_tensors_in_float32(name):
    mixer = make_mixer(name, torch.float32)
    kept = {n: t.clone() for n, t in mixer.state_dict().items() if n in ("A_log", "dt_bias")}
    mixer.bfloat16()
    for label, value in kept.items():
        assert torch.equal(mixer.state_dict()[label], value)
    x, layout = packed_input((3, 4), dtype=torch.bfloat16)
    y = mixer(x, layout)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert torch.isfinite(y).all()
    cache = mixer.new_cache(2, "cpu", torch.bfloat16)
    mixer(x, layout, cache)
    assert torch.isfinite(mixer(x[:2], SequenceLayout.from_lengths([1, 1]), cache)).all()


@every_mixer
def test_counted_parameters_and_cache_bytes_are_real(name):
    mixer, config = make_mixer(name, torch.float32), CONFIGS[name]
    assert config.num_parameters(D_MODEL) == sum(p.numel() for p in mixer.parameters())
    x, layout = packed_input((8, 0, 4), dtype=torch.float32)
    cache = mixer.new_cache(3, "cpu", torch.float32)
    mixer(x, layout, cache)
    per_token, per_sequence = config.cache_bytes(4)
    assert cache.nbytes() == 12 * per_token + 3 * per_sequence
    assert cache.nbytes(allocated=True) >= cache.nbytes()


@every_mixer
def test_values_depend_on_seed_and_name_only(name):
    first, second, other = (make_mixer(name, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@every_mixer
def test_declared_roles_name_real_parameters(name):
    mixer = make_mixer(name)
    parameters = dict(mixer.named_parameters())
    for module_name, module in mixer.named_modules():
        prefix = f"{module_name}." if module_name else ""
        if isinstance(module, DeclaresAdamW):
            assert all(prefix + label in parameters for label in module.adamw_parameters())
        if isinstance(module, DeclaresMatrices):
            for label, layout in module.logical_matrices().items():
                assert isinstance(layout, MatrixLayout)
                assert layout.num_rows == parameters[prefix + label].shape[-2]


@every_mixer
def test_max_logits_are_recorded_in_training_only(name):
    mixer = make_mixer(name)
    spec = mixer.qk_clip_spec()
    if spec is None:
        is_softmax = name in ("gqa-bias", "gqa-qk-norm")  # records, but its logits do not scale with its weights
        assert is_softmax == any(n == "max_logits" for n, _ in mixer.named_buffers())
        return
    assert isinstance(spec, QKClipSpec)
    x, layout = packed_input((4, 9))
    with torch.no_grad():
        mixer(x, layout)
    mixer.eval()
    mixer(x, layout)
    assert torch.equal(spec.max_logits(), torch.full((spec.num_heads,), -torch.inf))
    mixer.train()
    mixer(x, layout)
    first = spec.max_logits().clone()
    mixer(x * 0.5, layout)
    assert torch.equal(spec.max_logits(), first)
    mixer(x * 3, layout)
    assert (spec.max_logits() > first).any()
    spec.reset()
    assert torch.isinf(spec.max_logits()).all()
