"""Tiny models of the families of transformers that lalm's kernels run under, with random weights."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 61
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LAYERS = {"layer_types": ["linear_attention", "full_attention"]}
_DELTA = _LAYERS | {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 24,
    "linear_value_head_dim": 32,
}
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
_MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 32,
    "mamba_n_groups": 2,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
}
CONFIGS = {
    "qwen3_next": _COMMON | _DELTA | _EXPERTS,
    "qwen3_5_text": _COMMON | _DELTA,
    "qwen3_5_moe_text": _COMMON | _DELTA | _EXPERTS,
    "olmo_hybrid": _COMMON | _DELTA | {"linear_num_value_heads": 2},
    "kimi_linear": _COMMON
    | _LAYERS
    | {
        "num_key_value_heads": 4,
        "linear_num_heads": 2,
        "linear_head_dim": 32,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "n_group": 1,
        "topk_group": 1,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    },
    "mamba2": _COMMON
    | {"num_heads": 4, "head_dim": 16, "state_size": 32, "n_groups": 2, "expand": 2, "chunk_size": 16},
    "bamba": _COMMON | _MAMBA | {"attn_layer_indices": [1]},
    "falcon_h1": _COMMON | _MAMBA | {"mamba_d_ssm": 64},
    "nemotron_h": _COMMON
    | {
        "layers_block_type": ["mamba", "attention"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 32,
        "n_groups": 2,
        "chunk_size": 16,
    },
    "zamba2": _COMMON
    | {
        "layers_block_type": ["mamba", "hybrid"],
        "n_mamba_heads": 4,
        "mamba_headdim": 16,
        "mamba_d_state": 32,
        "mamba_ngroups": 2,
        "chunk_size": 16,
        "num_mem_blocks": 1,
        "use_shared_attention_adapter": False,
    },
    "granitemoehybrid": _COMMON
    | _MAMBA
    | {
        "layer_types": ["mamba", "attention"],
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "shared_intermediate_size": 16,
    },
}


def tiny(model_type: str, **changes) -> torch.nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(CONFIGS[model_type] | changes))
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()
    with torch.no_grad():  # weights as a trained model has them: every part of a layer counts
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                torch.nn.init.normal_(weight, std=0.15)
            elif "bias" in name and "dt" not in name:
                torch.nn.init.normal_(weight, std=0.1)
    return model


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(1))
