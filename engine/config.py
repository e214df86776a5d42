"""What the engine is told: the shape of a model, how to run it, and how one request is sampled."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

from engine.cache_size import CACHE_SIZES, CacheSize, is_cache_size
from engine.wording import shown

Dtype = Literal["float16", "bfloat16", "float32"]

GrammarKind = Literal["json", "json_schema", "regex", "ebnf", "structural_tag", "compiled"]

KVGranularity = Literal["tensor", "head", "channel", "token"]

RopeKind = Literal["linear", "dynamic", "llama3", "yarn", "qwen", "turbomind"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """How the rotary embedding is stretched beyond the length that a model was trained with.

    - `linear`: every angle is divided by `factor`.
    - `llama3`, `yarn`: long wavelengths are divided by `factor`, short ones are kept, those between are mixed; the
      other numbers are Hugging Face's of the same name. yarn multiplies cos and sin by `attention_factor`.
    - `dynamic` (Hugging Face), `qwen` (Qwen's own steps), `turbomind` (config.ini's rope_scaling_factor): the base
      grows with the length that a sequence may reach, see `engine.models.rope_scaling.rope_base`.
    """

    kind: RopeKind
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The shape of a dense decoder, in one vocabulary for every family and every source.

    `vocab_size` is the number of rows of the embedding. `dtype` is what the source stores. `qk_norm` normalizes each
    head of Q and K before rotary. A token sees the last `sliding_window` tokens, itself among them, or all with None.
    `logn` multiplies the query of the t-th token by log(t) / log(max_position_embeddings) where that is above 1.
    `rotate_down` is Recipe's: an int8 down_proj is that of rotated inputs.
    """

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    norm_eps: float
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 2048
    sliding_window: int | None = None
    logn: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    tie_word_embeddings: bool = False
    rotate_down: int = 0
    dtype: Dtype = "float16"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()


HEADS = ("fp16", "int8", "int4")
# Channels of a block in which the inputs of an int8 down_proj are rotated; 0 is no rotation. A thread loads eight
# values of 16 bits at once, so that a kernel rotates them where they are.
ROTATIONS = (0, 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What is quantized: weights and KV cache are two nouns, so that they compose.

    `head` is the output matrix beside w4a16 weights, one of HEADS; fp16 is what the other floats are. `kv_granularity`
    says what has a scale and a zero point of its own in an int8 cache: the KV heads of a rank together (tensor:
    TurboMind's), a head, a channel of a head, or a head of every single token (token). Of kv16 it is tensor.
    `rotate_down`, one of ROTATIONS and for w8a8 alone: silu(gate) * up is rotated by blocks of so many channels before
    it is rounded (`engine.kernels.rotation`), and down_proj's weight is stored to match.
    """

    weights: str = "fp16"
    kv: str = "kv16"
    group_size: int = 0
    head: str = "fp16"
    kv_granularity: KVGranularity = "tensor"
    rotate_down: int = 0

    def __post_init__(self) -> None:
        allowed: tuple[Any, ...]
        for name, value, allowed in (
            ("head", self.head, HEADS),
            ("kv_granularity", self.kv_granularity, get_args(KVGranularity)),
            ("rotate_down", self.rotate_down, ROTATIONS),
        ):
            if value not in allowed or isinstance(value, bool):
                raise ValueError(f"{name} is {shown(value)}, not one of {', '.join(map(str, allowed))}.")

    def fields(self) -> dict[str, Any]:
        """The fields as JSON has them; an fp16 head, TurboMind's granularity, and no rotation, are not said."""
        unsaid = {"head": "fp16", "kv_granularity": "tensor", "rotate_down": 0}
        return {name: value for name, value in asdict(self).items() if unsaid.get(name) != value}

    def __str__(self) -> str:
        """`w4a16`, `w4a16-kv8`, and `w4a16-kv8-channel` where TurboMind's granularity is not the one."""
        weights = self.weights if self.head == "fp16" else f"{self.weights}-{self.head}head"
        finer = "" if self.kv_granularity == "tensor" else f"-{self.kv_granularity}"
        return weights if self.kv == "kv16" else f"{weights}-{self.kv}{finer}"


# Fields of EngineConfig that are open when they are 0, and when they are None.
COUNTS = ("session_len", "max_batch_size", "num_tokens_per_iter", "cache_block_seq_len")
SWITCHES = ("quant_policy", "rope_scaling_factor", "use_logn_attn", "max_position_embeddings")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How a model is run; ValueError for a value out of range. Names and meanings are TurboMind's; the one deviation is
    said where it is. A number that is 0, and a switch that is None, is left open: what the workspace says.

    - `session_len`: most tokens of one sequence, prompt and answer.
    - `max_batch_size`: most sequences in one step.
    - `num_tokens_per_iter`: token budget of one step (decode and prefill chunks together).
    - `cache_max_entry_count`: the KV cache. Below 1 a share of FREE memory, after the weights (v0.1.0: of the device's
      total memory), from 1 on a number of pages, or an amount of memory such as "4GB", "512MiB".
    - `cache_block_seq_len`: tokens in a page.
    - `quant_policy`: 4 = int8 KV cache, 0 = not.
    - `deterministic`: the logits of a token are the same bits whatever runs beside it, at a cost in speed
      (`docs/decisions/0092-one-shape-one-order.md`).
    - `dtype`: computing type; `auto` is float32 on a CPU and the workspace's type on a GPU.
    - `tp`: tensor-parallel ranks: so many GPUs, or processes on the CPU, compute together.
    - `end_ids`: an answer ends at these tokens too, beside those of the workspace.
    - `rope_scaling_factor`, `use_logn_attn`, `max_position_embeddings`: see `ModelConfig`; a factor of 0 is off.
    """

    device: str = "cpu"
    dtype: Dtype | Literal["auto"] = "auto"
    session_len: int = 0
    max_batch_size: int = 0
    num_tokens_per_iter: int = 0
    cache_max_entry_count: CacheSize = 0.0
    cache_block_seq_len: int = 0
    quant_policy: int | None = None
    prefix_caching: bool = True
    deterministic: bool = False
    rope_scaling_factor: float | None = None
    use_logn_attn: bool | None = None
    max_position_embeddings: int | None = None
    tp: int = 1
    end_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        factor, trained, size = self.rope_scaling_factor, self.max_position_embeddings, self.cache_max_entry_count
        types = ("auto", *get_args(Dtype))
        count = "a whole number from 1 on, or 0 for what the workspace says"
        for name, holds, allowed in (
            ("device", isinstance(self.device, str), "cpu, cuda or cuda:N"),
            ("dtype", self.dtype in types, f"one of {', '.join(types)}"),
            *((name, _is_whole(getattr(self, name), least=0), count) for name in COUNTS),
            ("cache_max_entry_count", size == 0 or is_cache_size(size), CACHE_SIZES),
            ("quant_policy", self.quant_policy in (None, 0, 4), "0 (KV cache as computed) or 4 (int8)"),
            ("tp", _is_whole(self.tp, least=1), "a whole number from 1 on"),
            ("prefix_caching", isinstance(self.prefix_caching, bool), "true or false"),
            ("deterministic", isinstance(self.deterministic, bool), "true or false"),
            ("rope_scaling_factor", factor in (None, 0) or _is_number(factor, least=1), "0 (off) or at least 1"),
            ("use_logn_attn", self.use_logn_attn in (None, 0, 1), "true or false"),
            ("max_position_embeddings", trained is None or _is_whole(trained, least=1), "at least 1"),
        ):
            if not holds:
                raise ValueError(f"{name} is {getattr(self, name)!r}, but must be {allowed}.")

    @property
    def streams_weights(self) -> bool:
        """Whether weights are sent to the device, hashed on the way; for a CPU the files are mapped where they lie."""
        return self.device.startswith("cuda")

    def over(self, said: EngineConfig) -> EngineConfig:
        """These options, and where they leave something open, those of `said`."""
        taken = [name for name in (*COUNTS, "cache_max_entry_count") if getattr(self, name) == 0]
        taken += [name for name in SWITCHES if getattr(self, name) is None]
        return replace(self, **{name: getattr(said, name) for name in taken})

    def complete(self) -> EngineConfig:
        """These options with nothing left open but `session_len`: for a model that no workspace says anything about."""
        return self.over(DEFAULTS)

    def applied_to(self, model: ModelConfig) -> ModelConfig:
        """The model as it is run with these options. ValueError for a rope_scaling_factor beside a scaling of the
        model's own."""
        factor, scaling = self.rope_scaling_factor, model.rope_scaling
        if factor and scaling is not None and scaling.kind != "turbomind":
            raise ValueError(
                f"rope_scaling_factor is {factor}, but the model has a scaling of its own ({scaling.kind}): leave it "
                "out, or set it to 0."
            )
        if factor is not None and (scaling is None or scaling.kind == "turbomind"):
            scaling = RopeScaling(kind="turbomind", factor=float(factor)) if factor else None
        return replace(
            model,
            rope_scaling=scaling,
            logn=model.logn if self.use_logn_attn is None else bool(self.use_logn_attn),
            max_position_embeddings=self.max_position_embeddings or model.max_position_embeddings,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Grammar:
    """What an answer must look like, in one of the languages that xgrammar reads.

    `json` is any JSON object (`text` is empty), `json_schema` a schema, `regex` an expression that the whole answer
    matches, `ebnf` a grammar in GBNF whose first rule is `root`, `structural_tag` xgrammar's description of tags in
    text, and `compiled` what `Grammars.serialized` made of one of them.
    """

    kind: GrammarKind
    text: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How one request is sampled. `temperature` 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 are off.

    `repetition_penalty` p divides a positive logit of every token seen so far, prompt and answer, by p and multiplies a
    negative one (Keskar et al. 2019, section 4.1). A token that the answer has c > 0 times loses
    `presence_penalty` + c * `frequency_penalty` of its logit (OpenAI's formula), and `logit_bias` adds to it. `min_p`
    drops what is less likely than that share of the likeliest (Nguyen et al. 2024). `grammar` allows at each step only
    the tokens that it can go on with.

    The answer ends before a string of `stop`, and at an end token or one of `stop_token_ids`, which have no text.
    `seed` makes the answer repeatable whatever else runs. `logprobs` asks for the log-probability of each token and of
    that many of the likeliest, of the model's own distribution: before penalties, bias, grammar and temperature.
    """

    max_new_tokens: int = 512
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = field(default=())
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    grammar: Grammar | None = None


def _is_whole(value: Any, *, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: Any, *, least: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value < math.inf


DEFAULTS = EngineConfig(max_batch_size=64, num_tokens_per_iter=512, cache_max_entry_count=0.5, cache_block_seq_len=64)
