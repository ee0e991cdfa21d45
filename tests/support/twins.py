"""transformers' torch models of tiny random configs, and decoders with their weights."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax import nnx
from rows.common import SLIDES, SLIDING, hf_dict
from rows.dense import DENSE
from rows.fused import FUSED
from rows.sparse import SPARSE
from transformers.core_model_loading import revert_weight_conversion

from converters.names import leaves, stored_rule
from jgptq.models import FAMILIES, Decoder, ModelConfig, checkpoint_name, config_from_hf

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()

LENGTH = 24
TOKENS = np.random.default_rng(0).integers(0, 61, (2, LENGTH)).astype(np.int32)


def opt_dict(**changes) -> dict:
    """The config.json of an OPT, whose keys are its own."""
    sizes = {"vocab_size": 61, "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    return {"model_type": "opt", **sizes, "max_position_embeddings": 64, **changes}


def rope_row(neutral: dict | None, maximum: int = 64, **scaling) -> tuple[dict, dict | None]:
    """A Llama with a rotary scaling, and the scaling that must give other logits."""
    changed = None if neutral is None else {"rope_scaling": neutral or None}
    return hf_dict("llama", max_position_embeddings=maximum, rope_scaling=scaling), changed


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 4, "beta_slow": 0.25}
LONG = {"short_factor": [1.0 + i / 8 for i in range(8)], "long_factor": [1.5 + i for i in range(8)], "type": "longrope"}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
ROPE_TYPES = ["default", "linear", "dynamic", "yarn", "longrope", "llama3"]
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"]}
GEMMA2 = {"head_dim": 32, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0}

# name: (config.json, keys whose change must change the logits: otherwise the row proves nothing)
ROWS: dict[str, tuple[dict, dict | None]] = (
    {
        "llama": (hf_dict("llama", num_key_value_heads=None), {"rope_theta": 10000.0}),
        "llama_gqa": (hf_dict("llama"), {"rms_norm_eps": 1e-6}),
        "llama_tied": (hf_dict("llama", tie_word_embeddings=True), None),
        "llama_attention_bias": (hf_dict("llama", attention_bias=True), None),
        "llama_every_bias": (hf_dict("llama", attention_bias=True, mlp_bias=True), None),
        "llama_head_dim": (hf_dict("llama", head_dim=128), None),
        "gelu": (hf_dict("llama", hidden_act="gelu"), {"hidden_act": "silu"}),
        "gelu_new": (hf_dict("llama", hidden_act="gelu_new"), {"hidden_act": "gelu"}),
        "gelu_pytorch_tanh": (hf_dict("llama", hidden_act="gelu_pytorch_tanh"), {"hidden_act": "gelu"}),
        "relu": (hf_dict("llama", hidden_act="relu"), {"hidden_act": "silu"}),
        "linear": rope_row({}, type="linear", factor=4.0),
        "dynamic_below_maximum": rope_row(None, type="dynamic", factor=4.0),
        "dynamic_above_maximum": rope_row({}, maximum=16, type="dynamic", factor=4.0),
        "yarn": rope_row({}, **YARN),
        "yarn_default_betas": rope_row({}, rope_type="yarn", factor=4.0, original_max_position_embeddings=512),
        "yarn_not_truncated": rope_row(YARN, **YARN, truncate=False),
        "yarn_mscale": rope_row(YARN, **YARN, mscale=2.0, mscale_all_dim=0.5),
        "yarn_mscale_alone": rope_row({}, **YARN, mscale=2.0),
        "yarn_attention_factor": rope_row(YARN, **YARN, attention_factor=1.5),
        "longrope_below_original": rope_row({}, **LONG, original_max_position_embeddings=32),
        "longrope_above_original": rope_row({}, **LONG, original_max_position_embeddings=16),
        "longrope_factor": rope_row({}, **LONG, original_max_position_embeddings=16, factor=8.0),
        "longrope_attention_factor": rope_row({}, **LONG, original_max_position_embeddings=16, attention_factor=1.5),
        "longrope_original_outside": (
            hf_dict("llama", rope_scaling={**LONG, "original_max_position_embeddings": 32}, original_max_position_embeddings=16),
            {"original_max_position_embeddings": 32},
        ),
        "llama3": rope_row({}, rope_type="llama3", **LLAMA3),
        "mistral_full": (hf_dict("mistral", sliding_window=None), None),
        "mistral_window": (hf_dict("mistral", sliding_window=5), {"sliding_window": 6}),
        "mistral_window_head_dim": (hf_dict("mistral", sliding_window=7, head_dim=128), {"sliding_window": None}),
        "qwen2": (hf_dict("qwen2", sliding_window=5), SLIDING | {"max_window_layers": 1}),
        "qwen2_tied": (hf_dict("qwen2", tie_word_embeddings=True), None),
        "qwen2_max_window_layers": (hf_dict("qwen2", **SLIDING, max_window_layers=1), {"max_window_layers": 0}),
        "qwen2_default_window_layers": (hf_dict("qwen2", **SLIDING), {"max_window_layers": 1}),
        "qwen2_layer_types": (hf_dict("qwen2", **SLIDING, **ALTERNATING), {"layer_types": None}),
        "qwen3": (hf_dict("qwen3", head_dim=16), None),
        "qwen3_default_head_dim": (hf_dict("qwen3"), {"rms_norm_eps": 1e-6}),
        "qwen3_attention_bias": (hf_dict("qwen3", head_dim=16, attention_bias=True), None),
        "opt": (opt_dict(), {"activation_function": "gelu"}),
        "opt_post_norm_projected": (
            opt_dict(do_layer_norm_before=False, word_embed_proj_dim=32),
            {"activation_function": "gelu"},
        ),
        "opt_bare": (opt_dict(_remove_final_layer_norm=True, enable_bias=False, layer_norm_elementwise_affine=False), None),
        "opt_untied": (opt_dict(tie_word_embeddings=False, word_embed_proj_dim=32), None),
        "stablelm": (hf_dict("stablelm", layer_norm_eps=0.01), {"layer_norm_eps": 1e-5}),
        "stablelm_parallel": (
            hf_dict("stablelm", use_parallel_residual=True, use_qkv_bias=True, partial_rotary_factor=0.5),
            {"partial_rotary_factor": 0.25},
        ),
        "gemma": (hf_dict("gemma", head_dim=16), {"hidden_act": "relu"}),
        "gemma_first_files": (hf_dict("gemma", head_dim=16, hidden_act="gelu", attention_bias=True), None),
        "olmo2": (hf_dict("olmo2"), {"rms_norm_eps": 1e-6}),
        "olmo2_attention_bias": (hf_dict("olmo2", attention_bias=True, num_key_value_heads=None), None),
        "gemma2": (hf_dict("gemma2", **GEMMA2, sliding_window=5), {"attn_logit_softcapping": None}),
        "gemma2_default_window": (hf_dict("gemma2", **GEMMA2), {"query_pre_attn_scalar": 16}),
        "gemma2_windows": (
            hf_dict("gemma2", **GEMMA2, num_hidden_layers=3, sliding_window=7, layer_types=["full_attention", *SLIDES]),
            {"layer_types": None},
        ),
        "gemma2_untied": (
            hf_dict(
                "gemma2",
                **GEMMA2 | {"attn_logit_softcapping": None, "hidden_activation": "gelu"},
                sliding_window=9,
                tie_word_embeddings=False,
                attention_bias=True,
            ),
            {"final_logit_softcapping": None},
        ),
        "qwen3_window": (hf_dict("qwen3", head_dim=16, **SLIDING, max_window_layers=1), {"max_window_layers": 2}),
    }
    | DENSE
    | FUSED
    | SPARSE
)


def torch_config(hf: dict) -> transformers.PretrainedConfig:
    return transformers.AutoConfig.for_model(**json.loads(json.dumps(hf)))  # it changes the dicts that it is given


def torch_twin(hf: dict, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """transformers' model, with every weight, bias and norm far from its neutral value."""
    kind = transformers.AutoModelForCausalLM
    # In its eager attention, transformers 5.24 adds the bias of a Falcon with ALiBi twice.
    attention = "sdpa" if hf.get("alibi") else "eager"
    model = kind.from_config(torch_config(hf), dtype=dtype, attn_implementation=attention).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + noise / 2 if is_norm(name) else noise / 2 if name.endswith("bias") else noise / 5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator) / 5)
    return model


def is_norm(name: str) -> bool:
    return "norm" in name or ".ln_" in name


def is_buffer(name: str) -> bool:
    """Whether a state dict's entry is no parameter of the model: a constant that files do not hold."""
    return name.endswith("embed_scale")


def stored_state(model: torch.nn.Module, row: str) -> dict[str, torch.Tensor]:
    """The tensors of a torch model that files hold, by the names that they have there: in memory, transformers holds experts in
    one tensor."""
    state = {name: tensor for name, tensor in model.state_dict().items() if not is_buffer(name)}
    if FAMILIES[row].experts is not None:
        state = revert_weight_conversion(model, state)
    head = state.pop("lm_head.weight")
    return state if model.config.tie_word_embeddings else state | {f"{FAMILIES[row].head}.weight": head}


def with_weights(config: ModelConfig, model: torch.nn.Module) -> Decoder:
    """A decoder with the weights of a torch model: every leaf is set, and every tensor is used."""
    decoder = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    state = stored_state(model, config.model_type)
    for path, module, attribute in list(leaves(decoder)):
        rule, leaf = stored_rule(path, attribute, config.model_type), getattr(module, attribute)
        value = state.pop(f"{checkpoint_name(path, config.model_type)}.{rule.suffix}").float().numpy()
        value = value.T if rule.transposed else value
        assert leaf.get_value().shape == value.shape, path
        leaf.set_value(jnp.asarray(value))
    assert not state
    return decoder


@functools.cache
def twin(name: str) -> torch.nn.Module:
    return torch_twin(ROWS[name][0])


@functools.cache
def decoder_of(name: str) -> Decoder:
    return with_weights(config_from_hf(ROWS[name][0]), twin(name))


@functools.cache
def logits_of(name: str) -> np.ndarray:
    return logits(decoder_of(name))


def torch_logits(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS.astype(np.int64))).logits.float().numpy()


def logits(decoder: Decoder, tokens: np.ndarray = TOKENS) -> np.ndarray:
    return np.asarray(forward(decoder, jnp.asarray(tokens)))


forward = jax.jit(lambda decoder, tokens: decoder(tokens))
