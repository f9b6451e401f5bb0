"""Tiny models of any architecture in transformers, scaled down by the names of their settings."""

import dataclasses
import re
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

BLOCKS = 4
VOCABULARY = 160
WINDOW = 8

SIZES: tuple[tuple[str, Any], ...] = (
    (r"(.*_)?vocab_size(_per_layer_input)?", VOCABULARY),
    (r"pad_token_id|sep_token_id|mask_token_id|cls_token_id|eod_token_id|decoder_start_token_id", 0),
    (r"bos_token_id", 1),
    (r"eos_token_id|forced_eos_token_id", 2),
    (r"num_hidden_layers|n_layers?|num_layers|num_blocks|(num_)?(de|en)coder_layers", BLOCKS),
    (r"num_dense_layers|first_k_dense_replace|moe_layer_start_index", 1),
    (r"num_kv_shared_layers", 0),
    (r"num_key_value_heads|num_kv_heads|.*_num_key_value_heads|num_query_groups", 2),
    (r"(.*_)?(attention_heads|n_heads?|num_heads|num_key_heads|num_value_heads)", 4),
    (r"hidden_size|d_model|n_embd|embedding_(size|dim)|emb_dim|word_embed_proj_dim|lru_width", 32),
    (r"(in|out)put_embedding_size|attention_hidden_size|.*_embed_dim|router_hidden_size", 32),
    (r"(.*_)?(head_dim|dim_head|d_head|head_size)|kv_channels", 8),
    (r"(.*_)?(lora|norm|laurel|adapter)_rank", 8),
    (r"rotary_dim|hidden_size_per_layer_input", 8),
    (r"(.*_)?intermediate_size(_mlp)?|(.*_)?ffn_(dim|hidden_size)|dim_ff|dff|d_inner|n_inner|feed_forward_size", 64),
    (r"(moe_)?num_(local_)?experts|n_routed_experts|.*num_local_experts", 4),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k", 2),
    (r".*shared_experts", 1),
    (r"n_group|topk_group|num_expert_group|zero_expert_num", 1),
    (r"sliding_window(_size)?|(attention_)?window_size|local_attention|attention_chunk_size|keep_window_size", WINDOW),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_(source|target)_positions|context_length", 64),
    (r"(original_max_position_embeddings|model_max_length)", 64),
    # Scans are padded to whole chunks.
    (r"(mamba_)?chunk_size", 16),
    # Large enough that predictions are far from flat and that every block changes them.
    (r"initializer_range|init_std|embed_init_std", 0.2),
)
"""Regular expressions for names of numeric settings, with their values in a tiny model; the first match counts."""

ALTERNATING = ["sliding_attention", "full_attention"] * (BLOCKS // 2)

OVERRIDES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {
        "layer_types": ALTERNATING,
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 10_000.0} for kind in ALTERNATING[:2]},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    # Past the window, what a token attends to depends on later tokens; the default window is wide.
    "doge": {"keep_window_size": 2048},
    "dots3_note_text": {
        "sliding_window": WINDOW,
        "per_layer_config": {
            str(block): {
                "head_dim": 16,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "kv_lora_rank": 8,
                "q_lora_rank": 8,
                "qk_nope_head_dim": 8,
                "qk_rope_head_dim": 8,
                "v_head_dim": 8,
            }
            for block in (2, 3)
        },
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_state": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2, "mamba_n_heads": 8, "mamba_d_head": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "n_groups": 2},
    "nemotron_h": {"n_groups": 2, "mamba_num_heads": 8},
    "qwen4_exp_text": {
        "hc_lowrank": 8,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "ngram_vocab_size_base": 50,
        "split_ngram_parts": 1,
        "ple_embed_dim": 32,
    },
    "reformer": {"axial_pos_embds_dim": (16, 16), "axial_pos_shape": (8, 8)},
    "xlm": {"causal": True},
    # With several chunks, its code mixes dtypes.
    "xlstm": {"hidden_size": 128, "chunk_size": 64},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["mamba", "hybrid"] * 2},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2, "n_mamba_heads": 8},
    "zaya": {"num_experts_per_tok": 1},
}
"""Settings that names alone do not determine, by architecture: there they depend on one another."""


def tiny_config(model_type: str, **chosen: Any) -> PretrainedConfig:
    """The configuration of an architecture with four blocks of width 32 and a sliding window, if any, of 8 tokens.

    Args:
        model_type: Its name in transformers.
        **chosen: Settings that override these.
    """
    config_class: Any = CONFIG_MAPPING[model_type]
    settings: dict[str, Any] = {}
    fields = dataclasses.fields(config_class)
    for field in fields:
        number = isinstance(field.default, int | float) and not isinstance(field.default, bool)
        if number or re.fullmatch(r".*_token_id|head_dim|num_key_value_heads", field.name):
            value = next((value for pattern, value in SIZES if re.fullmatch(pattern, field.name)), None)
            if value is not None:
                settings[field.name] = value
        if field.name == "is_decoder":
            settings[field.name] = True
    if any(field.name == "kv_lora_rank" for field in fields):
        # Multi-head latent attention has separate keys for each head.
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    return config_class(**settings | OVERRIDES.get(model_type, {}) | chosen)


def tiny_model(model_type: str, dtype: torch.dtype = torch.float32, **chosen: Any) -> PreTrainedModel:
    """A tiny causal language model of an architecture, with the same weights, rounded, in every dtype."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(tiny_config(model_type, **chosen), dtype=torch.float32)
    return model.to(dtype).eval()
