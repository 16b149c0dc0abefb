"""GGUF files of tiny models, written by the gguf package."""

import json

import numpy as np
import torch

from perilune.data import HFTokenizer
from tests.data.small_tokenizers import byte_level

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 300}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "model.layers.": "blk.",
}


def reference(architecture, **more):
    """A model of transformers with random weights everywhere."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(architecture, **SIZES, **HEADS, **more)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 and "norm" else 0.0, 0.1)
    return model


def adjacent(array, heads):
    """Rows as llama.cpp's converter stores them for Llama."""
    return array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def write(path, model, architecture, *, kind="F32", keys=None, tensors=None):
    """Write a model of transformers as a GGUF file."""
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize

    writer = GGUFWriter(path, architecture)
    config = model.config
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_context_length(128)
    writer.add_rope_freq_base(50000.0)
    for key, value in (keys or {}).items():
        writer.add_key_value(key, value, *value_type(value))
    for name, tensor in {**model.state_dict(), **(tensors or {})}.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = tensor.numpy().astype(np.float32)
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if architecture == "llama" and part in name:
                array = adjacent(array, heads)
        for theirs, short in NAMES.items():
            name = name.replace(theirs, short)
        ggml = GGMLQuantizationType[kind if array.ndim == 2 else "F32"]
        writer.add_tensor(name, array if ggml.name == "F32" else quantize(array, ggml), raw_dtype=ggml)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def value_type(value):
    from gguf import GGUFValueType as Kind

    if isinstance(value, list):
        return (Kind.ARRAY, Kind.STRING if isinstance(value[0], str) else Kind.INT32)
    return {str: (Kind.STRING,), float: (Kind.FLOAT32,), int: (Kind.UINT32,), bool: (Kind.BOOL,)}[type(value)]


def write_with_text(path):
    """Write a file with tokenizer and template; return the tokenizer it was made of."""
    tree = json.loads(byte_level(plain=("<think>",)))
    vocab = tree["model"]["vocab"] | {token["content"]: token["id"] for token in tree["added_tokens"]}
    kinds = {token["content"]: 3 if token["special"] else 4 for token in tree["added_tokens"]}
    tokens = sorted(vocab, key=vocab.get)
    keys = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [kinds.get(token, 1) for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in tree["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}",
        "tokenizer.chat_template.tool_use": "tools",
    }
    theirs = reference("llama", tie_word_embeddings=True)
    theirs.resize_token_embeddings(len(tokens))
    write(path, theirs, "llama", keys=keys)
    return HFTokenizer(json.dumps(tree))
