"""The config.json of a model that leaves as a Hugging Face checkpoint. No torch."""

from __future__ import annotations

from typing import Any

from engine.config import ModelConfig, Recipe, RopeScaling
from engine.models.rope_scaling import HF_KINDS

HF_AWQ, COMPRESSED_TENSORS, SMOOTH_QUANT = "hf-awq", "compressed-tensors", "smooth-quant"
# By weights; smooth-quant is LMDeploy's own.
FORMS_OF = {"w4a16": (HF_AWQ, COMPRESSED_TENSORS), "w8a8": (COMPRESSED_TENSORS, SMOOTH_QUANT)}
FORMS = (HF_AWQ, COMPRESSED_TENSORS, SMOOTH_QUANT)
# The release of compressed-tensors whose reader the form was checked with.
CHECKED_VERSION = "0.20.0"


def hf_config(config: ModelConfig, *, tied: bool) -> dict[str, Any]:
    """A config.json that transformers reads as this model: a Llama, a Mistral (sliding window) or a Qwen3 (norms over
    heads), whatever family it came from. ValueError names what none of the three can say.
    """
    eos: int | list[int] | None = list(config.eos_token_ids)
    if len(config.eos_token_ids) < 2:
        eos = config.eos_token_ids[0] if config.eos_token_ids else None
    return {
        **_architecture(config),
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "rms_norm_eps": config.norm_eps,
        "rope_scaling": None if config.rope_scaling is None else _rope(config.rope_scaling),
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": tied,
        "torch_dtype": config.dtype,
        "vocab_size": config.vocab_size,
    }


def check_form(form: str, recipe: Recipe, what: object) -> None:
    """ValueError where a form is not known, or is none for the weights of a recipe; `what` is said to have them."""
    if form not in FORMS:
        raise ValueError(f"{form} is not a form of checkpoint that can be written; there are {', '.join(FORMS)}")
    if form not in FORMS_OF.get(recipe.weights, ()):
        of_weights = "; ".join(f"{weights} as {' or '.join(forms)}" for weights, forms in FORMS_OF.items())
        raise ValueError(
            f"{what} is {recipe}, which is not written as {form}: {of_weights}. Unquantized weights are in the "
            "checkpoint that it was built from."
        )


def quantization_config(form: str, recipe: Recipe) -> dict[str, Any]:
    """What config.json says about weights in that form."""
    group_size = recipe.group_size
    if form == SMOOTH_QUANT:
        return {"quant_method": "smooth_quant", "quant_dtype": "int8"}
    if recipe.weights == "w8a8":
        return _compressed("int-quantized", _scheme(8, "channel"), _scheme(8, "token", dynamic=True))
    if form == HF_AWQ:
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": ["lm_head"],
        }
    return _compressed("pack-quantized", _scheme(4, "group", symmetric=False, group_size=group_size), None)


def _scheme(
    bits: int, strategy: str, *, symmetric: bool = True, group_size: int | None = None, dynamic: bool = False
) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": strategy,
        "group_size": group_size,
        "dynamic": dynamic,
        "actorder": None,
        "block_structure": None,
        "observer": None if dynamic else "minmax",
        "observer_kwargs": {},
    }


def _compressed(form: str, weights: dict[str, Any], inputs: dict[str, Any] | None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "version": CHECKED_VERSION,
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _architecture(config: ModelConfig) -> dict[str, Any]:
    biased = config.qkv_bias or config.o_bias
    unsaid = {
        "logn attention": config.logn,
        "a sliding window beside biases or norms over heads": config.sliding_window and (biased or config.qk_norm),
        # The workspace has both or none, zeros for one that the model lacks.
        "biases of only some of q, k, v and o": config.qkv_bias != config.o_bias,
    }
    if problems := [what for what, there in unsaid.items() if there]:
        raise ValueError(f"this model has {' and '.join(problems)}, which no config.json of Hugging Face's says for it")
    if config.qk_norm:
        return {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": biased}
    if config.sliding_window:
        window = {"sliding_window": config.sliding_window}
        return {"architectures": ["MistralForCausalLM"], "model_type": "mistral", **window}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": biased,
        "mlp_bias": False,
    }


def _rope(scaling: RopeScaling) -> dict[str, Any]:
    if scaling.kind not in HF_KINDS:
        raise ValueError(
            f"this model scales its rotary embedding as {scaling.kind} does, which no config.json of Hugging Face's "
            f"says: it says {', '.join(HF_KINDS)}"
        )
    needed, optional = HF_KINDS[scaling.kind]
    # What a magnitude was inferred from is not kept, the magnitude is.
    names = [name for name in (*needed, *optional) if not name.startswith("mscale")]
    return {"rope_type": scaling.kind, **{name: getattr(scaling, name) for name in names}}
