import math

import pytest

from engine.config import RopeScaling
from engine.models.batch import packed
from engine.models.rope import rope_tables
from engine.models.rope_scaling import LARGEST, SMALLEST, check_rope, is_dynamic, read_rope, rope_base
from tests.engine.models.tiny import tiny_config


def config(kind, factor=1.0, **changes):
    scaling = RopeScaling(kind=kind, factor=factor)
    return tiny_config(
        **({"rope_theta": 1e4, "max_position_embeddings": 2048, "head_dim": 128} | changes), rope_scaling=scaling
    )


def powered(stretch):
    return 1e4 * math.exp(math.log(stretch) * 128 / 126)


# What the reference's engine computes once, when a request starts: (factor, limit) -> a of theta * a^(d / (d - 2)).
TURBOMIND = {(1.0, 100): 1.0, (2.0, 100): 2.0, (2.0, 2048): 2.0, (1.0, 3072): 1.5, (2.0, 3072): 2.0, (4.0, 8192): 13.0}
HF_DYNAMIC = {(1.0, 100): 1.0, (2.0, 100): 1.0, (2.0, 2048): 1.0, (1.0, 3072): 1.5, (2.0, 3072): 2.0, (4.0, 8192): 13.0}
QWEN = {1: 1, 100: 1, 2048: 1, 2049: 3, 4096: 3, 4097: 7, 8192: 7, 8193: 15}


@pytest.mark.parametrize("kind", ["turbomind", "dynamic"])
def test_the_base_grows_with_the_limit(kind):
    for (factor, limit), stretch in (TURBOMIND if kind == "turbomind" else HF_DYNAMIC).items():
        assert rope_base(config(kind, factor), limit) == pytest.approx(powered(stretch), rel=1e-12)


def test_qwens_base_grows_in_steps():
    for limit, stretch in QWEN.items():
        assert rope_base(config("qwen"), limit) == pytest.approx(powered(stretch), rel=1e-12)


def test_other_kinds_have_one_base():
    for kind in ("linear", "llama3", "yarn"):
        assert not is_dynamic(config(kind, 4.0)) and rope_base(config(kind, 4.0), 10**6) == 1e4
    assert is_dynamic(config("qwen")) and not is_dynamic(tiny_config())


def read(**fields):
    return read_rope(fields, trained=64)


def test_both_generations_and_both_places():
    scaling = RopeScaling(kind="linear", factor=2.0)
    assert read() == (1e4, None)
    assert read(rope_theta=5.0, rope_scaling={"type": "linear", "factor": 2}) == (5.0, scaling)
    assert read(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5.0}) == (5.0, scaling)
    both = {"rope_type": "linear", "factor": 2.0}
    assert read(rope_scaling=both, rope_parameters=both | {"rope_theta": 5.0}) == (5.0, scaling)
    assert read(rope_scaling={"rope_type": "default"}) == (1e4, None)


def test_numbers_are_carried():
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    assert read(rope_scaling={"rope_type": "llama3"} | llama3)[1] == RopeScaling(kind="llama3", **llama3)
    yarn = read(rope_scaling={"type": "yarn", "factor": 4.0})[1]
    assert (yarn.original_max_position_embeddings, yarn.beta_fast, yarn.beta_slow, yarn.truncate) == (64, 32, 1, True)
    assert yarn.attention_factor == pytest.approx(0.1 * math.log(4) + 1)
    said = {"attention_factor": 1.5, "beta_fast": 16, "beta_slow": 2, "truncate": False}
    assert read(rope_scaling={"type": "yarn", "factor": 4.0} | said)[1] == RopeScaling(
        kind="yarn", factor=4.0, original_max_position_embeddings=64, **said
    )
    ratio = read(rope_scaling={"type": "yarn", "factor": 4.0, "mscale": 0.5, "mscale_all_dim": 1.0})[1].attention_factor
    assert ratio == pytest.approx((0.05 * math.log(4) + 1) / (0.1 * math.log(4) + 1))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rope_scaling": "linear"}, "rope_scaling = 'linear'"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "longrope.*'default' or 'linear'"),
        ({"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2.0}}, "one rope_type"),
        ({"rope_scaling": {"type": ["linear"]}}, "one rope_type"),
        ({"rope_scaling": {"type": "linear"}}, r"rope_scaling\.factor = None"),
        ({"rope_scaling": {"type": "linear", "factor": -1}}, r"rope_scaling\.factor = -1"),
        ({"rope_scaling": {"type": "linear", "factor": True}}, r"rope_scaling\.factor = True"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 1}}, r"rope_scaling\.beta_fast = 1"),
        ({"rope_scaling": {"rope_type": "default", "factor": 2.0}}, r"rope_scaling\.factor = 2\.0"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, r"rope_scaling\.low_freq_factor = None"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": 1}}, r"rope_scaling\.truncate = 1"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, r"rope_parameters\.full_attention"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
            "more than one way",
        ),
        ({"use_dynamic_ntk": True, "rope_scaling": {"type": "linear", "factor": 2.0}}, "use_dynamic_ntk = True"),
        ({"rope_theta": 0}, "rope_theta = 0"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(fields, words):
    with pytest.raises(ValueError, match=words) as caught:
        read(**fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_theta": 1e300}, "rope_theta = 1e.300"),
        ({"rope_theta": 1e-9}, "rope_theta = 1e-09"),
        ({"rope_scaling": RopeScaling(kind="linear", factor=1e308)}, r"factor = 1e.308"),
        ({"rope_scaling": RopeScaling(kind="llama3", factor=2.0)}, "original_max_position_embeddings = 0"),
        ({"rope_scaling": RopeScaling(kind="dynamic", factor=2.0), "head_dim": 2}, "heads of 2"),
        (
            {
                "rope_scaling": RopeScaling(kind="yarn", factor=2.0, original_max_position_embeddings=16),
                "rope_theta": 1.0,
            },
            "rope_theta = 1.0 with yarn",
        ),
        ({"logn": True, "max_position_embeddings": 1}, "logn attention"),
    ],
)
def test_what_the_formulas_have_no_value_for_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        check_rope(tiny_config(**changes))


@pytest.mark.parametrize("kind", ["linear", "dynamic", "llama3", "yarn", "qwen", "turbomind"])
@pytest.mark.parametrize("theta", [2 * (1 + SMALLEST), 1e4, LARGEST])
@pytest.mark.parametrize("factor", [SMALLEST, 1.0, LARGEST])
def test_what_is_taken_is_computed(kind, theta, factor):
    scaling = RopeScaling(
        kind=kind,
        factor=factor,
        original_max_position_embeddings=1,
        low_freq_factor=SMALLEST,
        high_freq_factor=LARGEST,
    )
    for head_dim, trained in ((4, 1), (128, 2**31 - 1)):
        model = tiny_config(rope_scaling=scaling, rope_theta=theta, head_dim=head_dim, max_position_embeddings=trained)
        check_rope(model)
        rope_base(model, 2**31)
        assert not rope_tables(model, packed([[1, 2, 3]])).cos.isnan().any()
