import random

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from cli.overrides import compose_serve, quote


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
        ["folder=/x y/z", "serve.session_len=77", "serve.cache_max_entry_count=12", "serve.dtype=bfloat16"]
    )
    assert command.folder == "/x y/z"
    config = command.serve.engine_config()
    assert (config.session_len, config.cache_max_entry_count, config.dtype) == (77, 12.0, "bfloat16")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("serve.prot=1", r"no option 'serve\.prot'\. Did you mean serve\.port\?"),
        ("artefact=abc", "Did you mean artifact"),
        ("--port", "given as key=value"),
        ("+serve.x=1", "given as key=value"),
        ("serve.port=abc", "'abc' .* could not be converted to Integer"),
        ("serve.port=70000", r"serve\.port is 70000"),
        ("serve.cache_max_entry_count=0", "share of free memory"),
        ("serve.max_batch_size=0", "at least 1"),
        ("serve.dtype=int4", "one of auto"),
        ("serve.quant_policy=4", "belongs to the artifact .* recipe that was measured"),
        ("serve.rope_theta=1e6", "attribute of the model"),
        ("serve=nope", r"Could not find 'serve/nope' Available options in 'serve': default$"),
        ("serve.port=[", r"'serve\.port=\[' is not understood"),
    ],
)
def test_a_wrong_option_is_one_paragraph(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        compose_serve(["artifact=abcd", override])
    assert "\n" not in str(caught.value)
