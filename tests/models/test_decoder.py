"""The whole model."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from perilune.models import PRESETS, Decoder, build_model, hybrid_layers
from perilune.nn import GQAConfig, HybridCache, MoBAConfig
from perilune.ops.layout import SequenceLayout

MIXED = replace(
    PRESETS["smoke"],
    layers=("kda", "mla", "gqa"),
    gqa=GQAConfig(num_heads=2, head_dim=8, num_kv_heads=1),
    tie_embeddings=False,
    init_range=0.2,
)
# blocks so short that the tests' sequences have many
MOBA = MoBAConfig(
    num_heads=2, head_dim=8, num_kv_heads=1, moba_chunk_size=3, moba_topk=2, moba_decode="moba", moba_key_conv=3
)
SPARSE = replace(MIXED, layers=("moba", "kda", "moba"), moba=MOBA, moba_full_last_n=1)
CONFIGS = {
    "sparse": SPARSE,
    "mixed": MIXED,
    "dense": replace(MIXED, moe=None, first_k_dense=0),
    "smoke": PRESETS["smoke"],
}

every_model = pytest.mark.parametrize("name", CONFIGS)


def make_model(name: str, dtype: torch.dtype = torch.float64) -> Decoder:
    return build_model(CONFIGS[name], seed=0).to(dtype).eval()


def tokens_of(*lengths: int, seed: int = 0) -> tuple[Tensor, SequenceLayout]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 512, (sum(lengths),), generator=generator), SequenceLayout.from_lengths(lengths)


def steps(model: Decoder, cache: HybridCache, tokens: Tensor) -> Tensor:
    """Decode `[T, N]` tokens one at a time; logits `[T, N, vocab]`."""
    layout = SequenceLayout.from_lengths([1] * tokens.shape[1])
    return torch.stack([model(row, layout, cache) for row in tokens])


@every_model
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@torch.no_grad()
def test_prefill_chunks_steps_and_restored_snapshots_agree(name, dtype, tolerance):
    model = make_model(name, dtype)
    tokens, layout = tokens_of(20)
    expected = model(tokens, layout)

    def check(found: Tensor) -> None:
        torch.testing.assert_close(found, expected[-found.shape[0] :], rtol=0, atol=tolerance)

    check(steps(model, model.new_cache(1), tokens[:, None])[:, 0])
    cache = model.new_cache(1)
    parts = [model(part, SequenceLayout.from_lengths([len(part)]), cache) for part in tokens[:16].split([7, 1, 8])]
    snapshot = cache.snapshot(0)
    check(torch.cat([*parts, model(tokens[16:], SequenceLayout.from_lengths([4]), cache)]))
    other = model.new_cache(3)
    model(*tokens_of(2, 5, 3, seed=1), other)
    other.restore(1, snapshot)
    joint = torch.stack([torch.zeros(4, dtype=torch.int64), tokens[16:], torch.ones(4, dtype=torch.int64)], 1)
    check(steps(model, other, joint)[:, 1])
    assert other.lengths.tolist() == [6, 20, 7]
    fresh = model.new_cache(2)
    fresh.restore(0, snapshot)
    check(model(tokens[16:], SequenceLayout.from_lengths([4, 0]), fresh))


@every_model
@torch.no_grad()
def test_packed_equals_unpacked_and_permuted(name):
    model = make_model(name)
    lengths = (6, 0, 17, 1)
    tokens, layout = tokens_of(*lengths)
    parts = tokens.split(list(lengths))
    alone = [model(part, torch.tensor([0, len(part)])) for part in parts]
    torch.testing.assert_close(model(tokens, layout), torch.cat(alone), rtol=1e-10, atol=1e-10)
    order = [3, 1, 2, 0]
    permuted = model(torch.cat([parts[i] for i in order]), SequenceLayout.from_lengths([lengths[i] for i in order]))
    torch.testing.assert_close(permuted, torch.cat([alone[i] for i in order]), rtol=1e-10, atol=1e-10)


@every_model
@torch.no_grad()
def test_rows_join_fork_and_leave_a_running_batch(name):
    """What continuous batching does: decode, admit a prompt, fork it, retire a row; every row as if alone."""
    model = make_model(name)
    first, _ = tokens_of(30)
    second, _ = tokens_of(30, seed=1)
    alone = [model(t, SequenceLayout.from_lengths([30])) for t in (first, second)]
    cache = model.new_cache(1)
    model(first[:9], SequenceLayout.from_lengths([9]), cache)
    steps(model, cache, first[9:12, None])
    prompt = model.new_cache(1)
    model(second[:20], SequenceLayout.from_lengths([20]), prompt)
    prompt.reorder(torch.tensor([0, 0]))
    cache.append(prompt)
    found = steps(model, cache, torch.stack([first[12:15], second[20:23], second[20:23]], 1))
    torch.testing.assert_close(found[:, 0], alone[0][12:15], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found[:, 1], alone[1][20:23], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found[:, 2], found[:, 1], rtol=1e-10, atol=1e-10)
    assert cache.fork(1) == 3
    cache.reorder(torch.tensor([3, 0]))
    found = steps(model, cache, torch.stack([second[23:30], first[15:22]], 1))
    torch.testing.assert_close(found[:, 0], alone[1][23:30], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found[:, 1], alone[0][15:22], rtol=1e-10, atol=1e-10)


@every_model
@torch.no_grad()
def test_a_row_does_not_depend_on_its_neighbors(name):
    model = make_model(name, torch.float32)
    tokens, _ = tokens_of(12)
    noise, _ = tokens_of(60, seed=2)
    alone = model.new_cache(1)
    crowd = model.new_cache(5)
    model(tokens, SequenceLayout.from_lengths([12]), alone)
    model(torch.cat([noise[:40], tokens, noise[40:]]), SequenceLayout.from_lengths([30, 10, 12, 0, 20]), crowd)
    step = torch.full((3, 1), 5)
    found = steps(model, crowd, step.expand(3, 5))[:, 2]
    torch.testing.assert_close(found, steps(model, alone, step)[:, 0], rtol=0, atol=1e-4)


@every_model
def test_loss_gradients_reach_every_parameter(name):
    model = make_model(name).train()
    tokens, layout = tokens_of(40, 0, 24)
    model(tokens, layout).logsumexp(-1).square().sum().backward()
    for label, parameter in model.named_parameters():
        assert parameter.grad is not None, label
        assert torch.isfinite(parameter.grad).all(), label
        assert parameter.grad.abs().sum() > 0, label


def test_hidden_and_output_weight_make_logits():
    for name in ("mixed", "smoke"):
        model = make_model(name)
        tokens, layout = tokens_of(5, 3)
        logits = model.hidden(tokens, layout) @ model.output_weight.T
        torch.testing.assert_close(model(tokens, layout), logits)
        assert (model.output_weight is model.embed_tokens.weight) == CONFIGS[name].tie_embeddings


def test_weights_depend_on_name_and_seed_only():
    one, same, other = (build_model(PRESETS["smoke"], seed=seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not torch.equal(one["embed_tokens.weight"], other["embed_tokens.weight"])
    longer = build_model(replace(PRESETS["smoke"], layers=hybrid_layers(6, ratio=1)), seed=3).state_dict()
    assert all(torch.equal(one[key], longer[key]) for key in one)


def test_construction_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    build_model(PRESETS["smoke"], seed=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_half_precision_model():
    model = build_model(PRESETS["smoke"], seed=0, dtype=torch.bfloat16)
    kept = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert kept == {"layers.0.mixer.A_log", "layers.0.mixer.dt_bias"}
    tokens, layout = tokens_of(9, 4)
    exact = build_model(PRESETS["smoke"], seed=0)(tokens, layout)
    found = model(tokens, layout)
    assert (found.float() - exact).norm() < 0.05 * exact.norm()
    with torch.no_grad():
        cache = model.new_cache(2)
        model(tokens, layout, cache)
        assert torch.isfinite(steps(model, cache, torch.tensor([[1, 2]]))).all()


def test_metrics_of_training():
    model = make_model("mixed").train()
    tokens, layout = tokens_of(30)
    model(tokens, layout)
    specs = model.qk_clip_specs()
    assert [spec.kind for spec in specs] == ["mla", "gqa"]
    assert all(torch.isfinite(spec.max_logits()).all() for spec in specs)
    assert [float(layer.expert_load.sum()) for layer in model.moe_layers()] == [60.0, 60.0]
    before = [layer.router_bias.clone() for layer in model.moe_layers()]
    for layer in model.moe_layers():
        layer.update_router_bias(1e-3)
    assert all(not torch.equal(layer.router_bias, b) for layer, b in zip(model.moe_layers(), before, strict=True))
    assert all(layer.expert_load.sum() == 0 for layer in model.moe_layers())


def test_state_dict_loads_into_another_model():
    model, other = (build_model(PRESETS["smoke"], seed=seed) for seed in (0, 1))
    model.moe_layers()[0].router_bias += 0.5
    other.load_state_dict(model.state_dict())
    tokens, layout = tokens_of(6)
    assert torch.equal(other(tokens, layout), model(tokens, layout))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(torch.zeros(2, 3, dtype=torch.int64), torch.tensor([0, 3])), r"tokens must be \[T\]"),
        (lambda m: m(torch.zeros(3, dtype=torch.int64), torch.tensor([0, 2])), "must end with the number of tokens 3"),
        (
            lambda m: m(torch.zeros(2, dtype=torch.int64), torch.tensor([0, 2]), m.new_cache(2)),
            "cu_seqlens has 1 sequences but the cache has 2 rows",
        ),
        (
            lambda m: m(torch.zeros(1, dtype=torch.int64), torch.tensor([0, 1]), make_model("smoke").new_cache(1)),
            "cache has 2 entries but the model 3 layers",
        ),
    ],
)
def test_wrong_inputs_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(make_model("mixed"))


@pytest.mark.parametrize("prompt_lengths", [torch.tensor([1]), torch.tensor([1, 2], dtype=torch.int32), torch.ones(2)])
def test_prompt_lengths_are_one_for_each_sequence(prompt_lengths):
    model = make_model("sparse")
    with pytest.raises(ValueError, match=r"prompt_lengths must be \[2\] int64, one for each sequence, got"):
        model(*tokens_of(4, 3), prompt_lengths=prompt_lengths)


@torch.no_grad()
def test_prompt_lengths_matter_to_layers_that_read_blocks_alone():
    tokens, layout = tokens_of(20, 9)
    told = torch.tensor([11, 4])
    for name in CONFIGS:
        model = make_model(name)
        assert torch.equal(model(tokens, layout), model(tokens, layout, prompt_lengths=told)), name
    config = replace(SPARSE, moba=replace(MOBA, moba_decode="full"))
    model = build_model(config, seed=0).to(torch.float64).eval()
    plain, found = model(tokens, layout), model(tokens, layout, prompt_lengths=told)
    torch.testing.assert_close(found[:11], plain[:11])
    assert not torch.allclose(found[11:20], plain[11:20])
