import random

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from cli.overrides import compose_serve, quote
from engine.config import EngineConfig
from engine.storage.ini_keys import KEYS
from server.config import IMMUTABLE, MEANINGLESS, ServeConfig


def through_hydra(parser: OverridesParser, override: str) -> object:
    """The value as Hydra's parser and then OmegaConf understand it."""
    config = OmegaConf.create({"value": None})
    OmegaConf.update(config, "value", parser.parse_override(override).value())
    return config.value


@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=pytest.mark.soak)])
def test_any_prefix_of_an_id_arrives_unchanged(count: int) -> None:
    parser, generator = OverridesParser.create(), random.Random(0)
    for _ in range(count):
        prefix = f"{generator.getrandbits(256):064x}"[: generator.randint(4, 64)]
        assert through_hydra(parser, quote(f"artifact={prefix}")) == prefix
    for prefix in ("3e911223", "1e5", "0123", "1_000", "deadbeef", "0000", "4e00"):
        assert compose_serve([f"artifact={prefix}"]).artifact == prefix
    for prefix in ("3e911223", "1e5", "12345678"):  # what Hydra makes of these without quotes
        assert through_hydra(parser, f"artifact={prefix}") != prefix


@given(st.text(alphabet=st.sampled_from("ab'\"\\${}:,= []()é3"), min_size=1, max_size=12))
@settings(max_examples=500, deadline=None)
def test_any_reason_arrives_unchanged(text: str) -> None:
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return  # quoted by the user for Hydra
    assert through_hydra(OverridesParser.create(), quote(f"waiver={text}")) == text


def test_what_the_user_has_quoted_is_left_alone() -> None:
    assert compose_serve(["artifact='3e911223'", 'waiver="it, is: fine"']).waiver == "it, is: fine"
    assert compose_serve(["artifact=null"]).artifact is None


def test_options_reach_the_engine() -> None:
    command = compose_serve(
        [
            "folder=/x y/z",
            "serve.session_len=77",
            "serve.max_batch_size=5",
            "serve.num_tokens_per_iter=99",
            "serve.cache_block_seq_len=32",
            "serve.cache_max_entry_count=12",
            "serve.dtype=bfloat16",
            "serve.prefix_caching=false",
            "serve.quant_policy=0",
            "serve.rope_scaling_factor=2",
            "serve.use_logn_attn=1",
            "serve.max_position_embeddings=4096",
        ]
    )
    assert command.folder == "/x y/z"
    assert command.serve.engine_config() == EngineConfig(
        session_len=77,
        max_batch_size=5,
        num_tokens_per_iter=99,
        cache_block_seq_len=32,
        cache_max_entry_count=12,
        dtype="bfloat16",
        prefix_caching=False,
        quant_policy=0,
        rope_scaling_factor=2.0,
        use_logn_attn=True,
        max_position_embeddings=4096,
    )
    assert command.serve.unmeasured == [
        "quant_policy",
        "rope_scaling_factor",
        "use_logn_attn",
        "max_position_embeddings",
    ]


def test_what_is_not_said_is_left_to_the_artifact() -> None:
    command = compose_serve(["artifact=abcd"])
    assert command.serve.engine_config() == EngineConfig()
    assert command.serve == ServeConfig(), "conf/serve/default.yaml has the defaults of the code"
    assert command.serve.unmeasured == []


@pytest.mark.parametrize("size", ["64MB", "4GB", "1.5GiB", "512 MiB", "0.25"])
def test_the_cache_can_be_an_amount_of_memory(size: str) -> None:
    command = compose_serve(["artifact=abcd", f"serve.cache_max_entry_count={size}"])
    assert str(command.serve.engine_config().cache_max_entry_count) == size


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("serve.prot=1", r"no option 'serve\.prot'\. Did you mean serve\.port\?"),
        ("artefact=abc", "Did you mean artifact"),
        ("--port", "given as key=value"),
        ("+serve.x=1", "given as key=value"),
        ("serve.port=70000", r"serve\.port is 70000"),
        ("serve.cache_max_entry_count=0", r"serve\.cache_max_entry_count is 0, .* share of the free memory"),
        ("serve.cache_max_entry_count=-4", r"share .* pages .* 512MB or 4GB"),
        ("serve.cache_max_entry_count=1.5", "a whole number of pages"),
        ("serve.cache_max_entry_count=4gb", "'4gb', but must be .* 4GB"),
        ("serve.cache_max_entry_count=0GB", "'0GB', but must be"),
        ("serve.cache_max_entry_count=", "'', but must be"),
        ("serve.cache_max_entry_count=true", "incompatible with type"),
        ("serve.session_len=0", r"serve\.session_len is 0, but must be null"),
        ("serve.max_batch_size=0", "at least 1"),
        ("serve.cache_block_seq_len=-1", "at least 1"),
        ("serve.dtype=int4", "one of auto"),
        ("serve.quant_policy=8", r"serve\.quant_policy is 8, but must be 0 .* or 4"),
        ("serve.rope_scaling_factor=0.5", r"serve\.rope_scaling_factor is 0\.5, but must be 0 \(off\) or at least 1"),
        ("serve.use_logn_attn=2", r"serve\.use_logn_attn is 2, but must be true or false"),
        ("serve.max_position_embeddings=0", r"serve\.max_position_embeddings is 0, but must be at least 1"),
        ("serve.weight_type=fp16", "belongs to the artifact .* recipe that was measured"),
        ("serve.rope_theta=1e6", "attribute of the model"),
        ("serve.step_length=1", r"TurboMind's own engine.*ini\.step_length=\.\.\."),
        ("serve=nope", r"Could not find 'serve/nope' Available options in 'serve': default$"),
        ("serve.port=abc", r"^serve\.port is 'abc', but must be a whole number\.$"),
        ("serve.deterministic=maybe", r"^serve\.deterministic is 'maybe', but must be true or false\.$"),
        ("serve.session_len=long", r"^serve\.session_len is 'long', but must be null or a whole number\.$"),
        ("port=1", r"there is no option 'port'\. Did you mean serve\.port\?"),
        ("demo", r"'demo' is not understood: .* such as artifact=demo\.$"),
        ("serve.port=[", r"'serve\.port=\[' is not understood"),
    ],
)
def test_a_wrong_option_is_one_paragraph(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        compose_serve(["artifact=abcd", override])
    assert "\n" not in str(caught.value)


def test_every_key_of_config_ini_can_be_set_or_says_why_not() -> None:
    options = set(ServeConfig.__dataclass_fields__)
    assert set(KEYS) <= options | IMMUTABLE.keys() | set(MEANINGLESS)
    assert not options & (IMMUTABLE.keys() | set(MEANINGLESS))
