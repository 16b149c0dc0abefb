"""The MoBA layer: its equations, its two modes, its cache, its key convolution."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from perilune.nn import (
    BlockEntry,
    GroupedQueryAttention,
    KeyConv,
    MoBAConfig,
    MoBAttention,
    Rotary,
    initialize,
    rotate,
    zero_key_convs,
)
from perilune.nn.block_entry import close_blocks
from perilune.nn.config import KEY_CONV_REWIND
from perilune.ops.layout import SequenceLayout
from perilune.ops.moba import moba_attention, routing
from perilune.optim import parameter_groups
from tests.nn.helpers import CONFIGS, D_MODEL, MOBA, make_mixer, packed_input, run_pieces, split_packed

TIGHT = {"rtol": 1e-10, "atol": 1e-11}
NAMES = [name for name in CONFIGS if name.startswith("moba")]
DECODES = [name for name in NAMES if CONFIGS[name].moba_decode == "moba"]
LENGTHS = (45, 3, 26)

every_moba = pytest.mark.parametrize("name", NAMES)
every_decode = pytest.mark.parametrize("name", DECODES)


def make_layer(dtype: torch.dtype = torch.float64, **change) -> MoBAttention:
    layer = MoBAttention(MoBAConfig(**{**MOBA, **change}), D_MODEL)
    return initialize(layer, seed=0, init_range=0.4).to(dtype)


@every_moba
def test_layer_equals_equations(name):
    layer = make_mixer(name)
    config, size = layer.config, layer.config.moba_chunk_size
    x, layout = packed_input((27,))
    q, k, v = (proj(x) for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
    if config.moba_key_conv:
        past = F.pad(k.T, (config.moba_key_conv - 1, 0))
        k = k + F.silu(F.conv1d(past[None], layer.k_conv.weight, groups=k.shape[1]))[0].T
    q, k, v = (t.view(27, -1, config.head_dim) for t in (q, k, v))
    if config.use_rope:
        turns = Rotary.build(config.head_dim, config.rope).turns(torch.arange(27), q.dtype)
        q, k = rotate(q, turns), rotate(k, turns)
    heads, largest = [], []
    for h in range(config.num_heads):
        kv = h // (config.num_heads // config.full.kv_heads)
        logits = q[:, h] @ k[:, kv].T * config.head_dim**-0.5
        for t in range(27):
            own = t // size
            means = k[: own * size, kv].unflatten(0, (own, size)).mean(1)
            best = (means @ q[t, h]).topk(min(own, config.moba_topk - 1)).indices
            block = torch.arange(27) // size
            logits[t, ~(torch.isin(block, best) | (block == own)) | (torch.arange(27) > t)] = -torch.inf
        heads.append(torch.softmax(logits, -1) @ v[:, kv])
        largest.append(logits.max().detach())
    expected = torch.stack(heads, 1).flatten(1) @ layer.o_proj.weight.T
    torch.testing.assert_close(layer(x, layout), expected)
    torch.testing.assert_close(layer.max_logits.float(), torch.stack(largest).float())


@pytest.mark.parametrize("name", ["moba", "moba-mha", "moba-block-alone"])
def test_full_mode_is_grouped_query_attention_with_the_same_state_dict(name):
    layer = make_mixer(name)
    peer = GroupedQueryAttention(layer.config.full, D_MODEL).double()
    assert list(peer.state_dict()) == list(layer.state_dict())
    peer.load_state_dict(layer.state_dict())
    x, layout = packed_input(LENGTHS)
    sparse = layer(x, layout)
    layer.set_mode("full")
    assert torch.equal(layer(x, layout), peer(x, layout))
    layer.set_mode("moba")
    assert torch.equal(layer(x, layout), sparse)
    assert not torch.allclose(sparse, peer(x, layout))


def test_an_unknown_mode_is_refused():
    layer = make_mixer("moba")
    with pytest.raises(ValueError, match="mode must be one of"):
        layer.set_mode("dense")
    assert layer.mode == "moba"


@every_moba
def test_the_route_is_what_a_forward_reads(name):
    layer = make_mixer(name)
    x, layout = packed_input((45, 0, 26))
    expected = layer(x, layout)
    layer.set_mode("full")
    route = layer.route(x, layout)
    size, topk = layer.config.moba_chunk_size, layer.config.moba_topk
    assert route.past.shape == (71, layer.config.num_heads, topk - 1)
    q, k, v = layer._project(x, layout, None)
    o = moba_attention(q, k, v, block_size=size, topk=topk, cu_seqlens_q=layout, routing=route)
    torch.testing.assert_close(layer.o_proj(o.flatten(1)), expected, **TIGHT)


@every_decode
@pytest.mark.parametrize("mode", ["moba", "full"])
@torch.no_grad()
def test_steps_across_block_borders_equal_a_prefill(name, mode):
    layer = make_mixer(name)
    layer.set_mode(mode)
    x, layout = packed_input(LENGTHS)
    sequences = split_packed(x, LENGTHS)
    expected = split_packed(layer(x, layout), LENGTHS)
    for pieces in (
        [(20, 0, 3), (2, 0, 0), *[(1, 1, 1)] * 3, (9, 0, 2), *[(1, 0, 1)] * 5],
        [(0, 0, 1), *[(1, 1, 1)] * 3],
    ):
        for y, full in zip(run_pieces(layer, sequences, pieces)[0], expected, strict=True):
            torch.testing.assert_close(y, full[: len(y)], **TIGHT)


@pytest.mark.parametrize("key_conv", [0, 3])
@torch.no_grad()
def test_generated_tokens_read_everything_where_so_configured(key_conv):
    layer = make_layer(moba_decode="full", moba_key_conv=key_conv)
    x, layout = packed_input((45, 23, 29))
    sequences = split_packed(x, (45, 23, 29))
    prompts = torch.tensor([40, 18, 24])
    found, _ = run_pieces(layer, sequences, [(11, 18, 2), (29, 0, 22), *[(1, 1, 1)] * 5])
    sparse, expected = layer(x, layout), layer(x, layout, None, prompts)
    torch.testing.assert_close(torch.cat(found), expected, **TIGHT)
    for y, plain, prompt in zip(split_packed(expected, (45, 23, 29)), sparse.split([45, 23, 29]), prompts, strict=True):
        torch.testing.assert_close(y[:prompt], plain[:prompt], **TIGHT)
        assert not torch.allclose(y[prompt:], plain[prompt:])
    layer.set_mode("full")
    torch.testing.assert_close(expected[40:45], layer(x, layout)[40:45], **TIGHT)
    torch.testing.assert_close(layer(x, layout, None, prompts), layer(x, layout), **TIGHT)


@pytest.mark.parametrize("decode", ["full", "moba"])
@torch.no_grad()
def test_a_caller_may_say_where_prompts_end(decode):
    """Prompts in pieces of one token, drafts of several, and rows that are not yet where others are."""
    layer = make_layer(moba_decode=decode)
    x, layout = packed_input((45, 23, 29))
    prompts = torch.tensor([40, 18, 24])
    expected = layer(x, layout, None, prompts)
    assert torch.equal(expected, layer(x, layout)) == (decode == "moba")
    for pieces in (
        [(37, 15, 21), *[(1, 1, 1)] * 8],
        [(40, 18, 24), (3, 3, 3), (2, 2, 2)],
        [(40, 14, 20), *[(1, 1, 1)] * 5, (0, 4, 4)],
        [(38, 17, 24), (5, 2, 1), (2, 4, 4)],
    ):
        found, _ = run_pieces(layer, split_packed(x, (45, 23, 29)), pieces, prompts)
        torch.testing.assert_close(torch.cat(found), expected, **TIGHT)


@pytest.mark.parametrize(("precision", "gate"), [("autocast", "kv"), ("bfloat16", "kv"), ("bfloat16", "float32")])
@torch.no_grad()
def test_cached_means_are_those_of_prefill_to_the_bit(precision, gate):
    dtype = torch.float32 if precision == "autocast" else torch.bfloat16
    layer = make_layer(dtype, moba_gate_dtype=gate)
    x, layout = packed_input(LENGTHS, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "autocast"):
        _, cache = run_pieces(layer, split_packed(x, LENGTHS), [(9, 0, 2), (7, 1, 0), *[(1, 1, 1)] * 2, (27, 0, 22)])
        _, k, _ = layer._project(x, layout, None)
    _, (means,) = cache.means.packed()
    options = routing.MobaOptions(block_size=4, topk=2, scale=1.0, layout_q=layout, layout_k=layout)
    assert k.dtype == torch.bfloat16
    expected = routing.block_means(k, options, torch.float32 if gate == "float32" else torch.bfloat16)
    complete = torch.cat([torch.arange(-(-n // 4)) < n // 4 for n in LENGTHS])
    assert torch.equal(means.float(), expected[complete].float())


def test_steps_inside_blocks_do_not_ask_the_device():
    """Tensors on meta have no values that could be read."""
    config = CONFIGS["moba"]
    cache = BlockEntry.empty(config, 2, "meta", torch.float32)
    token = torch.empty(2, config.full.kv_heads, config.head_dim, device="meta")
    for _ in range(config.moba_chunk_size - 1):
        cache.tokens.push(token, token)
        close_blocks(cache, torch.float32)
    assert cache.means.max_length == 0


@torch.no_grad()
def test_a_layer_may_change_its_mode_between_prompt_and_generation():
    layer = make_mixer("moba")
    x, layout = packed_input((30,))
    cache = layer.new_cache(1, "cpu", torch.float64)
    layer.set_mode("full")
    layer(x[:29], SequenceLayout.from_lengths([29]), cache)
    layer.set_mode("moba")
    last = layer(x[29:], SequenceLayout.from_lengths([1]), cache)
    torch.testing.assert_close(last, layer(x, layout)[29:], **TIGHT)


@every_moba
@torch.no_grad()
def test_tokens_that_are_taken_back_leave_no_trace(name):
    layer = make_mixer(name)
    x, _ = packed_input(LENGTHS)
    other, _ = packed_input((24,), seed=1)
    sequences = split_packed(x, LENGTHS)
    _, cache = run_pieces(layer, sequences, [(30, 0, 9), (3, 2, 4)])
    kept = cache.clone()
    layer(torch.cat([other[:11], other[11:]]), SequenceLayout.from_lengths([11, 0, 13]), cache)
    layer(other[:3], SequenceLayout.from_lengths([1, 1, 1]), cache)
    for lengths in ([40, 3, 24], [33, 2, 13]):
        cache.truncate(torch.tensor(lengths))
        assert cache.tokens.lengths.tolist() == lengths
    assert cache.nbytes() == kept.nbytes()
    for lengths in ([1, 1, 1], [9, 0, 10], [1, 0, 1]):
        new = torch.cat([s[:n] for s, n in zip(split_packed(other, (10, 4, 10)), lengths, strict=True)])
        step = SequenceLayout.from_lengths(lengths)
        torch.testing.assert_close(layer(new, step, cache), layer(new, step, kept), **TIGHT)


@torch.no_grad()
def test_a_row_goes_back_behind_a_key_convolution_by_so_many_tokens():
    layer = make_mixer("moba-key-conv")
    x, _ = packed_input((40, 10))
    _, cache = run_pieces(layer, split_packed(x, (40, 10)), [(40, 10)])
    for lengths, message in (
        ([40 - KEY_CONV_REWIND - 1, 10], r"can go back to \[24, 0\], by 16 tokens, got \[23, 10\]"),
        ([41, 10], "cannot be cut"),
        ([-1, 10], "cannot be cut"),
    ):
        with pytest.raises(ValueError, match=message):
            cache.truncate(torch.tensor(lengths))
    cache.truncate(torch.tensor([30, 10]))
    cache.truncate(torch.tensor([40 - KEY_CONV_REWIND, 0]))
    layer(x[:4], SequenceLayout.from_lengths([2, 2]), cache)
    with pytest.raises(ValueError, match=r"can go back to \[24, 0\]"):  # what lay before is gone
        cache.truncate(torch.tensor([40 - KEY_CONV_REWIND - 1, 0]))
    assert cache.tokens.lengths.tolist() == [26, 2]


@every_moba
@torch.no_grad()
def test_forked_joined_and_overwritten_rows_go_on_as_if_alone(name):
    layer = make_mixer(name)
    x, _ = packed_input((45, 26))
    first, second = split_packed(x, (45, 26))
    _, cache = run_pieces(layer, [first], [(17,)])
    _, other = run_pieces(layer, [second, second], [(9, 14)])
    cache.append(other)
    cache.reorder(torch.tensor([2, 0, 0, 1]))
    cache.assign(3, cache.select(torch.tensor([1])))
    assert isinstance(cache, BlockEntry)
    assert cache.tokens.lengths.tolist() == [14, 17, 17, 17]
    for _ in range(8):
        places = zip((second, first, first, first), cache.tokens.lengths.tolist(), strict=True)
        new = torch.stack([s[t] for s, t in places])
        y = layer(new, SequenceLayout.from_lengths([1] * 4), cache)
        torch.testing.assert_close(y[1:3], y[3:].expand(2, -1), **TIGHT)
    for row, (sequence, length) in enumerate(((second, 14), (first, 17))):
        alone, _ = run_pieces(layer, [sequence], [(length,), *[(1,)] * 8])
        torch.testing.assert_close(y[row], alone[0][-1], **TIGHT)


def test_rows_of_other_models_do_not_mix():
    shapes = {
        make_mixer(name).new_cache(1, "cpu", torch.float64).row_shapes for name in ("gqa", "moba", "moba-key-conv")
    }
    assert len(shapes) == 3


@pytest.mark.parametrize("taps", [3, 5])
def test_key_convolution_is_torchs_within_each_sequence(taps):
    conv = initialize(KeyConv(6, taps), seed=0).double()
    assert conv.weight.shape == (6, 1, taps)
    assert conv.weight.abs().max() <= taps**-0.5
    k = torch.randn(19, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    layout = SequenceLayout.from_lengths([7, 0, 1, 11])
    expected = [
        part + F.silu(F.conv1d(F.pad(part.T, (taps - 1, 0))[None], conv.weight, groups=6))[0].T
        for part in k.split([7, 1, 11])
    ]
    torch.testing.assert_close(conv(k, layout), torch.cat(expected), **TIGHT)


def test_a_zeroed_key_convolution_changes_nothing_and_learns():
    plain, layer = make_layer(), make_layer(moba_key_conv=3)
    missing = layer.load_state_dict(plain.state_dict(), strict=False)
    assert missing.missing_keys == ["k_conv.weight"]
    x, layout = packed_input(LENGTHS)
    assert not torch.allclose(layer(x, layout), plain(x, layout))
    zero_key_convs(layer)
    torch.testing.assert_close(layer(x, layout), plain(x, layout), **TIGHT)
    layer(x, layout).square().sum().backward()
    assert layer.k_conv.weight.grad.abs().max() > 0


@pytest.mark.parametrize("key_conv", [0, 3])
def test_gradcheck(key_conv):
    layer = make_layer(moba_key_conv=key_conv, num_kv_heads=2)
    x, layout = packed_input((17, 0, 6))
    names, values = zip(*layer.named_parameters(), strict=True)

    def call(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x, layout))

    layer.eval()
    assert torch.autograd.gradcheck(call, (x.requires_grad_(), *values), fast_mode=True)


@pytest.mark.parametrize("policy", ["recent", "sink_recent", "minmax", "oracle"])
@torch.no_grad()
def test_other_policies_prefill_in_chunks_as_at_once(policy):
    layer = make_layer(moba_policy=policy, moba_decode="full")
    x, layout = packed_input((45, 26))
    found, _ = run_pieces(layer, split_packed(x, (45, 26)), [(10, 0), (20, 3), (15, 23)])
    expected = layer(x, layout)
    torch.testing.assert_close(torch.cat(found), expected, **TIGHT)
    assert not torch.allclose(expected, make_layer()(x, layout))


def test_the_gates_dtype_decides_among_near_means():
    """Means that bfloat16 cannot tell apart: rounded they tie, and the lower block is read."""
    layer = make_layer(torch.bfloat16, moba_chunk_size=1, use_rope=False, num_heads=1, head_dim=2)
    wide = MoBAttention(replace(layer.config, moba_gate_dtype="float32", moba_chunk_size=2), D_MODEL)
    narrow = MoBAttention(replace(layer.config, moba_chunk_size=2), D_MODEL)
    k = torch.tensor([[1.0, 0], [1, 0], [1, 0], [1 + 2**-7, 0], [0, 0], [0, 0]]).bfloat16()[:, None]
    q = torch.ones(6, 1, 2).bfloat16()
    v = torch.arange(6.0).bfloat16()[:, None, None].expand(6, 1, 2)
    layout = SequenceLayout.from_lengths([6])
    lower, higher = (mixer._attend(q, k, v, layout, layout)[5, 0, 0] for mixer in (narrow, wide))
    assert lower < 3 < higher


def test_key_convolutions_are_adamws_and_do_not_decay():
    layer = make_layer(moba_key_conv=3)
    groups = {name: group for group in parameter_groups(layer, lr=1.0) for name, _ in group["params"]}
    assert groups["k_conv.weight"]["kind"] == "adamw"
    assert groups["k_conv.weight"]["weight_decay"] == 0
    assert groups["k_proj.weight"]["kind"] == "muon"
