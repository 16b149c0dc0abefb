"""Models of transformers that run MoBA by name: equal to sdpa where all is read, to a mask by hand where not."""

import inspect
import sys

import pytest
import torch

from perilune.errors import BackendError
from perilune.integrations import register_moba

transformers = pytest.importorskip("transformers", reason="the hf extra is not installed")
from transformers.masking_utils import AttentionMaskInterface, eager_mask  # noqa: E402
from transformers.modeling_utils import AttentionInterface  # noqa: E402
from transformers.models.llama.modeling_llama import eager_attention_forward  # noqa: E402

BLOCK, TOPK, LAYERS, VOCAB = 8, 2, 3, 50
LONG = 5 * BLOCK + 3
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    # wide enough for attention to matter: with 0.02 it is nearly a mean
    "initializer_range": 0.3,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}


def build(family="Llama", attention="moba", seed=0, **changes):
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **changes})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    model.set_attn_implementation(attention)
    return model.eval()


@pytest.fixture(autouse=True)
def settings():
    register_moba(block_size=BLOCK, topk=TOPK)


@pytest.fixture(scope="module", autouse=True)
def by_hand():
    """MoBA's mask made from rotated queries and keys for eager attention; the last `config.full_last_n` layers full."""
    AttentionInterface.register("by_hand", attend_by_hand)
    AttentionMaskInterface.register("by_hand", eager_mask)


def attend_by_hand(module, query, key, value, attention_mask, scaling, **others):
    if module.layer_idx < LAYERS - module.config.full_last_n:
        attention_mask = moba_mask(query, key)
    return eager_attention_forward(module, query, key, value, attention_mask, scaling)


def moba_mask(query, key):
    """`[b, H, L, L]`, 0 where a query reads and -inf elsewhere, by equations 2 to 6 of the paper."""
    keys = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    length = keys.shape[2]
    position, block = torch.arange(length), torch.arange(length) // BLOCK
    means = torch.stack([part.mean(2) for part in keys.split(BLOCK, 2)], 2)
    scores = query @ means.transpose(2, 3)
    past = torch.arange(means.shape[2]) < block[:, None]
    best = scores.masked_fill(~past, -torch.inf).topk(TOPK - 1, -1).indices
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True) & past
    chosen |= torch.arange(means.shape[2]) == block[:, None]
    read = chosen[..., block] & (position <= position[:, None])
    return torch.zeros(read.shape).masked_fill(~read, -torch.inf)


def tokens(batch=2, length=LONG, seed=0):
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def assert_same(reference, got, atol=2e-5):
    torch.testing.assert_close(got, reference, atol=atol, rtol=1e-4)


CACHE = "cache" if "cache" in inspect.signature(transformers.LlamaModel.forward).parameters else "past_key_values"
"""What models call it: 5.17 has another name for it than 5.24."""
FAMILIES = pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])


@FAMILIES
@torch.no_grad()
def test_what_fits_into_the_blocks_that_are_read_equals_sdpa(family):
    model, x = build(family), tokens(length=BLOCK * TOPK)
    got = model(x).logits
    model.set_attn_implementation("sdpa")
    assert_same(model(x).logits, got)


@FAMILIES
@pytest.mark.parametrize("full_last_n", [0, 1])
@torch.no_grad()
def test_longer_sequences_equal_a_mask_by_hand(family, full_last_n):
    register_moba(block_size=BLOCK, topk=TOPK, full_last_n=full_last_n)
    model, x = build(family), tokens()
    got = model(x).logits
    model.config.full_last_n = full_last_n
    model.set_attn_implementation("by_hand")
    assert_same(model(x).logits, got)
    model.set_attn_implementation("sdpa")
    assert (model(x).logits - got).abs().max() > 0.01


@torch.no_grad()
def test_the_dense_oracle_has_its_own_name():
    model, x = build(), tokens()
    got = model(x).logits
    model.set_attn_implementation("moba_naive")
    assert_same(model(x).logits, got)


@torch.no_grad()
def test_with_every_layer_full_it_is_sdpa_in_prompt_and_steps():
    register_moba(block_size=BLOCK, topk=TOPK, full_last_n=LAYERS, decode="moba")
    model, x = build(), tokens()
    got, steps = model(x).logits, stepped(model, x, [LONG - 2, 1, 1])
    model.set_attn_implementation("sdpa")
    assert_same(model(x).logits, got)
    assert_same(got, steps)


@torch.no_grad()
def test_the_models_own_scaling_is_used():
    model, x = build(), tokens(length=BLOCK * TOPK)
    for layer in model.model.layers:
        layer.self_attn.scaling = 1.7
    got = model(x).logits
    model.set_attn_implementation("sdpa")
    assert_same(model(x).logits, got)


def test_short_sequences_have_the_gradients_of_sdpa_and_long_ones_those_of_the_mask():
    model = build().train()
    model.config.full_last_n = 0
    for x, other in ((tokens(length=BLOCK * TOPK), "sdpa"), (tokens(), "by_hand")):
        gradients = []
        for name in ("moba", other):
            model.set_attn_implementation(name)
            model.zero_grad()
            model(x, labels=x).loss.backward()
            gradients.append([parameter.grad for parameter in model.parameters()])
        for got, reference in zip(*gradients, strict=True):
            assert_same(reference, got)


def test_padding_neither_gets_nor_gives_gradients():
    model, x = build().train(), tokens()
    mask = right_padded([LONG, BLOCK + 3])
    embeddings = model.get_input_embeddings()(x).detach().requires_grad_()
    model(inputs_embeds=embeddings, attention_mask=mask).logits[mask.bool()].square().sum().backward()
    assert embeddings.grad[~mask.bool()].abs().max() == 0
    assert embeddings.grad[mask.bool()].abs().amin(0).max() > 0


def right_padded(lengths, width=LONG):
    return (torch.arange(width) < torch.tensor(lengths)[:, None]).long()


@pytest.mark.parametrize("lengths", [(LONG, BLOCK * 3 + 1), (17, LONG), (LONG - 4, 0), (LONG - 3, LONG - 3)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
@torch.no_grad()
def test_a_right_padded_row_equals_the_row_alone(lengths, dtype):
    model, x = build(), tokens()
    logits = model(x, attention_mask=right_padded(lengths).to(dtype)).logits
    for row, length in enumerate(lengths):
        if length:
            assert_same(model(x[row : row + 1, :length]).logits, logits[row : row + 1, :length])
    assert logits.isfinite().all()


def stepped(model, x, chunks, cache=None, mask=None):
    """Logits of a prompt that comes in chunks."""
    cache = cache or transformers.DynamicCache(config=model.config)
    parts, done = [], 0
    for size in chunks:
        seen = None if mask is None else mask[:, : done + size]
        parts.append(model(x[:, done : done + size], attention_mask=seen, **{CACHE: cache}).logits)
        done += size
    assert done == x.shape[1]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("chunks", [(20, LONG - 20), (BLOCK, 2 * BLOCK, LONG - 3 * BLOCK), (LONG - 2, 2)])
@torch.no_grad()
def test_a_prompt_in_chunks_equals_the_prompt_at_once(chunks):
    model, x = build(), tokens()
    assert_same(model(x).logits, stepped(model, x, chunks))


@torch.no_grad()
def test_a_padded_prompt_in_chunks_equals_it_at_once():
    model, x, mask = build(), tokens(), right_padded([LONG, 26])
    whole, parts = model(x, attention_mask=mask).logits, stepped(model, x, (20, 20, LONG - 40), mask=mask)
    assert_same(whole[mask.bool()], parts[mask.bool()])


@pytest.mark.parametrize("decode", ["full", "moba"])
@torch.no_grad()
def test_a_cache_with_room_for_more_changes_nothing(decode):
    register_moba(block_size=BLOCK, topk=TOPK, decode=decode)
    model, x, mask = build(), tokens(), right_padded([LONG, 26])
    chunks = (20, LONG - 22, 1, 1)
    static = transformers.StaticCache(config=model.config, max_cache_len=80)
    assert_same(stepped(model, x, chunks), stepped(model, x, chunks, static))
    static.reset()
    padded = stepped(model, x, chunks, static, mask)
    assert_same(stepped(model, x, chunks, mask=mask)[mask.bool()], padded[mask.bool()])


@torch.no_grad()
def test_a_step_reads_everything_by_default():
    """The cache is a prompt's, read sparsely; what follows is generated."""
    model, x = build(), tokens()
    caches = [transformers.DynamicCache(config=model.config) for _ in range(2)]
    for cache in caches:
        model(x[:, :-1], **{CACHE: cache})
    got = model(x[:, -1:], **{CACHE: caches[0]}).logits
    sparse = model(x).logits[:, -1:]
    model.set_attn_implementation("sdpa")
    assert_same(model(x[:, -1:], **{CACHE: caches[1]}).logits, got)
    assert (sparse - got).abs().max() > 1e-3


@torch.no_grad()
def test_a_step_continues_the_prompt_if_asked_to():
    register_moba(block_size=BLOCK, topk=TOPK, decode="moba")
    model, x = build(), tokens()
    assert_same(model(x).logits, stepped(model, x, [LONG - 12] + [1] * 12))


@FAMILIES
@torch.no_grad()
def test_generation_with_and_without_cache_agrees_in_moba_decode_mode(family):
    register_moba(block_size=BLOCK, topk=TOPK, decode="moba")
    model = build(family)
    settings = {"max_new_tokens": 2 * BLOCK + 2, "do_sample": False, "output_logits": True}
    results = [
        model.generate(tokens(length=30), return_dict_in_generate=True, **settings, **cache)
        for cache in ({}, {"use_cache": False}, {"cache_implementation": "static", "disable_compile": True})
    ]
    for other in results[1:]:
        assert torch.equal(results[0].sequences, other.sequences)
        assert_same(torch.stack(results[0].logits), torch.stack(other.logits), atol=1e-4)


@torch.no_grad()
def test_drafted_tokens_change_nothing_in_moba_decode_mode():
    register_moba(block_size=BLOCK, topk=TOPK, decode="moba")
    model, x, widths = build(), tokens(1, 6).repeat(1, 5), []
    model.model.layers[0].register_forward_pre_hook(lambda _, inputs: widths.append(inputs[0].shape[1]))
    settings = {"max_new_tokens": 2 * BLOCK + 2, "do_sample": False}
    plain = model.generate(x, **settings)
    assert set(widths[1:]) == {1}
    widths.clear()
    assert torch.equal(model.generate(x, prompt_lookup_num_tokens=3, **settings), plain)
    assert max(widths[1:]) > 1, "some tokens were drafted"


@torch.no_grad()
def test_two_names_stand_for_two_settings():
    register_moba(block_size=4, topk=3, name="moba_fine")
    model, x = build(), tokens()
    coarse = model(x).logits
    model.set_attn_implementation("moba_fine")
    fine = model(x).logits
    assert (fine - coarse).abs().max() > 0.01
    model.set_attn_implementation("moba_fine_naive")
    assert_same(model(x).logits, fine)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[1, 1, 1, 1], [0, 1, 1, 1]], "padding on the left in sequence 1"),
        ([[0, 0, 0, 1], [1, 1, 1, 1]], "padding on the left in sequence 0"),
        ([[1, 1, 1, 1], [1, 0, 1, 1]], "padding between tokens in sequence 1.*run prompts of one length together"),
        (torch.zeros(2, 1, 4, 4), r"must be \[b, L\].* got torch.float32 of shape \(2, 1, 4, 4\)"),
        (torch.ones(2, 1, 4, 4, dtype=torch.bool), r"must be \[b, L\]"),
        ([[1, 1, 1], [1, 1, 1]], "3 columns for 4 positions"),
    ],
)
def test_masks_that_it_does_not_take_are_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        build()(tokens(length=4), attention_mask=torch.as_tensor(mask))


def test_generation_behind_padding_is_refused_with_what_to_do():
    mask = right_padded([LONG, 26])
    with pytest.raises(ValueError, match=r"generate\(\) writes behind padding .*: run prompts of one length together"):
        build().generate(tokens(), attention_mask=mask, max_new_tokens=2, do_sample=False)


def test_dropout_is_refused_where_it_would_be_applied():
    model, x = build(attention_dropout=0.1), tokens(length=4)
    model(x)
    with pytest.raises(ValueError, match=r"attention dropout must be 0 .*got 0\.1"):
        model.train()(x)


def test_other_masks_of_models_are_refused():
    model = build("Mistral", sliding_window=4)
    with pytest.raises(ValueError, match="asks for another mask"):
        model(tokens())
    packed = torch.cat([torch.arange(20), torch.arange(LONG - 20)])[None]
    with pytest.raises(ValueError, match="packed by position_ids"):
        build()(tokens(1), position_ids=packed, use_cache=False)


@pytest.mark.parametrize(
    "argument", [{"sliding_window": 4}, {"softcap": 30.0}, {"s_aux": torch.zeros(4)}, {"is_causal": False}]
)
def test_arguments_that_change_attention_are_refused(argument):
    attend = transformers.AttentionInterface()["moba"]
    q = torch.randn(1, 4, 6, 8)
    with pytest.raises(ValueError, match=f"model asks for {next(iter(argument))}"):
        attend(build().model.layers[0].self_attn, q, q, q, None, **argument)


@torch.no_grad()
def test_it_returns_heads_behind_positions_and_no_weights():
    attend = transformers.AttentionInterface()["moba"]
    module = build().model.layers[0].self_attn
    q, k, v = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    out, weights = attend(module, q, k, v, None, scaling=0.5, dropout=0.0)
    assert out.shape == (2, 6, 4, 8)
    assert out.is_contiguous()
    assert weights is None
    with pytest.raises(ValueError, match="for 2 sequences with 6 new positions of 9"):
        attend(module, q, k, v, torch.ones(2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="for 2 sequences"):
        attend(module, q, k, v, torch.ones(3, 9, dtype=torch.bool))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_size": 0, "topk": 2}, "block_size"),
        ({"block_size": 8, "topk": 0}, "topk"),
        ({"block_size": 8, "topk": 2, "full_last_n": -1}, "full_last_n must be >= 0, got -1"),
        ({"block_size": 8, "topk": 2, "decode": "sparse"}, "decode"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        register_moba(**settings)


def test_without_transformers_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.masking_utils", None)
    with pytest.raises(BackendError, match=r"pip install 'perilune\[hf\]'"):
        register_moba(block_size=8, topk=2)
