"""Language models of transformers: what is in a block of each, by the `model_type` of its configuration.

Only what reads and writes the hidden states of a block is declared: attention, or what stands in its place, and the
feed-forward part; experts and routers are in `mixtures`. Left out are embeddings, the output layer, and what Gemma 3n and 4 add beside
their blocks (inputs of each layer, alternating updates, the learned residual, which is of low rank already).
"""

from __future__ import annotations

from corda_vlm.families.base import Layers

QKV: Layers = tuple((f"self_attn.{role}_proj", role, "attn.in") for role in ("q", "k", "v"))
ATTENTION: Layers = (*QKV, ("self_attn.o_proj", "o", "attn.out"))
SWIGLU: Layers = (
    ("mlp.gate_proj", "gate", "mlp.in"),
    ("mlp.up_proj", "up", "mlp.in"),
    ("mlp.down_proj", "down", "mlp.mid"),
)
_FUSED: Layers = (("mlp.gate_up_proj", "gate_up", "mlp.in"), ("mlp.down_proj", "down", "mlp.mid"))

LLAMA: Layers = (*ATTENTION, *SWIGLU)
PHI3: Layers = (
    ("self_attn.qkv_proj", "qkv", "attn.in"),
    ("self_attn.o_proj", "o", "attn.out"),
    *_FUSED,
)
GLM: Layers = (*ATTENTION, *_FUSED)
PLAIN: Layers = (  # no gate
    *ATTENTION,
    ("mlp.up_proj", "up", "mlp.in"),
    ("mlp.down_proj", "down", "mlp.mid"),
)
STARCODER2: Layers = (
    *ATTENTION,
    ("mlp.c_fc", "up", "mlp.in"),
    ("mlp.c_proj", "down", "mlp.mid"),
)
# Beside the attention, not after it: both read one normalized input.
PHI: Layers = (
    *QKV,
    ("self_attn.dense", "o", "attn.out"),
    ("mlp.fc1", "up", "attn.in"),
    ("mlp.fc2", "down", "mlp.mid"),
)
COHERE: Layers = (
    *ATTENTION,
    ("mlp.gate_proj", "gate", "attn.in"),
    ("mlp.up_proj", "up", "attn.in"),
    ("mlp.down_proj", "down", "mlp.mid"),
)
GPT2: Layers = (
    ("attn.c_attn", "qkv", "attn.in"),
    ("attn.c_proj", "o", "attn.out"),
    ("mlp.c_fc", "up", "mlp.in"),
    ("mlp.c_proj", "down", "mlp.mid"),
)
GPT_NEOX: Layers = (
    ("attention.query_key_value", "qkv", "attn.in"),
    ("attention.dense", "o", "attn.out"),
    ("mlp.dense_h_to_4h", "up", "mlp.in"),
    ("mlp.dense_4h_to_h", "down", "mlp.mid"),
)
OPT: Layers = (
    *QKV,
    ("self_attn.out_proj", "o", "attn.out"),
    ("fc1", "up", "mlp.in"),
    ("fc2", "down", "mlp.mid"),
)
# The gated delta net in place of attention: the output's gate z, how much is written (b) and how fast it fades (a) are
# read off the same normalized input as q, k and v.
QWEN3_5: Layers = (
    *(
        (f"linear_attn.in_proj_{part}", role, "attn.in")
        for part, role in (("qkv", "qkv"), ("z", "gate"), ("b", "gate"), ("a", "gate"))
    ),
    ("linear_attn.out_proj", "o", "attn.out"),
    *LLAMA,
)
# Experts that see all tokens, as they are called beside those that see some
SHARED: Layers = tuple(
    (f"mlp.{path}.{role}_proj", role, stream)
    for path in ("shared_expert", "shared_experts", "shared_mlp")
    for role, stream in (("gate", "mlp.in"), ("up", "mlp.in"), ("down", "mlp.mid"))
)
# As before, but fused, and with a shared expert.
QWEN3_NEXT: Layers = (
    ("linear_attn.in_proj_qkvz", "qkv", "attn.in"),
    ("linear_attn.in_proj_ba", "gate", "attn.in"),
    ("linear_attn.out_proj", "o", "attn.out"),
    *LLAMA,
    *SHARED,
)
# Multi-head latent attention goes through narrow projections, which are normalized.
DEEPSEEK: Layers = (
    *LLAMA,
    ("self_attn.q_a_proj", "q", "attn.in"),
    ("self_attn.q_b_proj", "q", "attn.q_mid"),
    ("self_attn.kv_a_proj_with_mqa", "kv", "attn.in"),
    ("self_attn.kv_b_proj", "kv", "attn.kv_mid"),
)
# A short gated convolution in place of attention in most blocks
LFM2: Layers = (
    *QKV,
    ("self_attn.out_proj", "o", "attn.out"),
    ("conv.in_proj", "qkv", "attn.in"),
    ("conv.out_proj", "o", "attn.out"),
    ("feed_forward.w1", "gate", "mlp.in"),
    ("feed_forward.w3", "up", "mlp.in"),
    ("feed_forward.w2", "down", "mlp.mid"),
)
# A block has a dense feed-forward part, or one expert that sees all tokens beside those that see some.
LLAMA4: Layers = (
    *ATTENTION,
    *(
        (f"feed_forward.{path}{role}_proj", role, stream)
        for path in ("", "shared_expert.")
        for role, stream in (("gate", "mlp.in"), ("up", "mlp.in"), ("down", "mlp.mid"))
    ),
)
# Some blocks attend to the image instead: k and v of all of them read the same projected states of the vision tower.
MLLAMA: Layers = (
    *LLAMA,
    ("cross_attn.q_proj", "q", "attn.in"),
    ("cross_attn.k_proj", "k", "/vision_states"),
    ("cross_attn.v_proj", "v", "/vision_states"),
    ("cross_attn.o_proj", "o", "attn.out"),
)

DECODERS: dict[str, tuple[str, Layers]] = {
    **dict.fromkeys(
        (
            "llama",
            "mistral",
            "qwen2",
            "qwen3",
            "gemma",
            "gemma2",
            "gemma3_text",
            "smollm3",
            "olmo2",
            # since
            "cwm",
            "ernie4_5",
            "exaone",
            "exaone4",
            "gemma3n_text",
            "gemma4_text",
            "granite",
            "helium",
            "hunyuan_v1_dense",
            "hyperclovax",
            "internlm3",
            "ministral",
            "ministral3",
            "olmo",
            "olmo3",
            "seed_oss",
            "stablelm",
            "vaultgemma",
            # within a model that sees
            "molmo2_text",
            "qwen2_5_vl_text",
            "qwen2_vl_text",
            "qwen3_vl_text",
        ),
        ("layers", LLAMA),
    ),
    # mixtures of experts: what is in those see `mixtures`
    **dict.fromkeys(
        (
            "granitemoe",
            "gpt_oss",
            "mixtral",
            "olmoe",
            "qwen2_moe",
            "qwen3_moe",
            "qwen3_vl_moe_text",
        ),
        ("layers", LLAMA),
    ),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), ("layers", DEEPSEEK)),
    **dict.fromkeys(("apertus", "arcee", "nemotron"), ("layers", PLAIN)),
    **dict.fromkeys(("cohere", "cohere2"), ("layers", COHERE)),
    **dict.fromkeys(("glm", "glm4", "glm4v_text"), ("layers", GLM)),
    "gpt2": ("h", GPT2),
    "gpt_neox": ("layers", GPT_NEOX),
    "lfm2": ("layers", LFM2),
    "llama4_text": ("layers", LLAMA4),
    "mllama_text_model": ("layers", MLLAMA),
    "opt": (r"decoder\.layers", OPT),
    "phi": ("layers", PHI),
    "phi3": ("layers", PHI3),
    "qwen3_5_text": ("layers", QWEN3_5),
    "qwen3_next": ("layers", QWEN3_NEXT),
    "starcoder2": ("layers", STARCODER2),
}
"""model_type -> where its blocks are within the decoder (a regular expression), and what is in one."""
