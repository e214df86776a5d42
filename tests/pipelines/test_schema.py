import pytest

from pipelines.ini_options import Ini
from pipelines.schema import KV, Calibration, Config, Evaluation, Gates, Model, Text, Weights, check


def config(**parts):
    whole = {
        "model": Model(name="m", path="m"),
        "calibration": Calibration(name="c", path="c.txt"),
        "evaluation": Evaluation(name="e", text=Text(path="e.txt")),
    }
    return Config(**{**whole, **parts})


def test_a_valid_configuration_passes():
    check(config())
    check(config(model=Model(name="m", repo="o/n", revision="0" * 40)))
    check(config(model=Model(name="m", digest="0" * 64)))
    check(config(weights=Weights(name="w8a8", bits=8, alphas=[])))
    check(config(calibration=Calibration(name="c", kind="ptb", path="copy")))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"tp": 0}, "tp=0 must be at least 1"),
        ({"model": Model(path="m")}, "model.name is empty"),
        ({"model": Model(name="m")}, "model has no source: give model.path"),
        ({"model": Model(name="m", path="a", repo="o/n", revision="0" * 40)}, "model.path and model.repo are both"),
        ({"model": Model(name="m", repo="o/n", revision="main")}, "model.revision=main must be a commit"),
        ({"model": Model(name="m", repo="o/n")}, "model.revision=None must be a commit"),
        ({"model": Model(name="m", repo="o/n", revision="0" * 40, digest="0" * 64)}, "pinned by model.revision"),
        ({"model": Model(name="m", path="a", digest="12")}, "model.digest=12 must be a SHA-256"),
        ({"model": Model(name="m", path="a", session_len=-1)}, "model.session_len=-1"),
        ({"calibration": Calibration(path="c", samples=0)}, "calibration.samples=0 must be at least 1"),
        ({"calibration": Calibration(path="c", sequence_length=1)}, "calibration.sequence_length=1 must be at least 2"),
        ({"calibration": Calibration(path="c", sampling="some")}, "sampling=some must be one of random, first"),
        ({"calibration": Calibration(path="c", seed=-1)}, "calibration.seed=-1"),
        ({"calibration": Calibration(path="c", kind="wiki")}, "calibration.kind=wiki must be one of text, wikitext2"),
        ({"calibration": Calibration(kind="text")}, "calibration has no source"),
        ({"calibration": Calibration(kind="ptb")}, "calibration.kind=ptb has no pinned hub copy"),
        ({"calibration": Calibration(kind="c4", repo="a/b")}, "calibration.revision=None must be a commit"),
        ({"weights": Weights(name="w2")}, "weights.name=w2 must be one of fp16, w8a8, w4a16"),
        ({"weights": Weights(name="w4a16", bits=3)}, "weights.bits=3 must be 4"),
        ({"weights": Weights(name="w4a16", bits=8)}, "weights.bits=8 is not w4a16: AWQ stores 4 bits"),
        ({"weights": Weights(name="w8a8", bits=8, head="int8")}, "weights.head=int8 is for w4a16"),
        ({"weights": Weights(name="w8a8", bits=8, rotate_down=4)}, "weights.rotate_down=4 must be one of 0, 8"),
        ({"weights": Weights(name="w8a8", bits=4)}, "weights.bits=4 is not w8a8"),
        ({"weights": Weights(name="w8a8", bits=8, alphas=[0.5, -0.1])}, "weights.alphas=-0.1 must be from 0 to 1"),
        ({"weights": Weights(search="all")}, "weights.search=all must be one of grid, none"),
        ({"weights": Weights(name="w4a16", head="int2")}, "weights.head=int2 must be one of fp16, int8, int4"),
        ({"weights": Weights(group_size=4)}, "weights.group_size=4 must be at least 8"),
        ({"weights": Weights(alpha=1.5)}, "weights.alpha=1.5 must be from 0 to 1"),
        ({"weights": Weights(activation_exponents=[2.0])}, "weights.activation_exponents=2.0 must be from 0 to 1"),
        ({"kv": KV(name="kv4")}, "kv.name=kv4 must be one of kv16, kv8"),
        ({"kv": KV(name="kv8", granularity="page")}, "kv.granularity=page must be one of tensor, head, channel, token"),
        ({"kv": KV(name="kv8", granularity="token", symmetric=True)}, "kv.symmetric=true is for scales of calibration"),
        ({"ini": Ini(max_batch_size=-1)}, "ini.max_batch_size=-1 must be at least 0"),
        ({"ini": Ini(rope_scaling_factor=0.5)}, "ini.rope_scaling_factor is 0.5, but must be 0 (off) or at least 1."),
        ({"evaluation": Evaluation(text=Text(path="e"), confidence=1.0)}, "evaluation.confidence=1.0"),
        ({"evaluation": Evaluation(text=Text(path="e"), max_tokens=1)}, "evaluation.max_tokens=1"),
        ({"evaluation": Evaluation(text=Text(path="e"), gates=Gates(top1_agreement_min=2))}, "top1_agreement_min=2"),
        ({"evaluation": Evaluation(text=Text(path="e"), gates=Gates(answer_flips_max=0.1))}, "evaluation.questions"),
    ],
)
def test_what_is_out_of_range_is_named(parts, message):
    with pytest.raises(ValueError, match="not valid: ") as error:
        check(config(**parts))
    assert message in str(error.value)


def test_all_problems_are_named_at_once():
    with pytest.raises(ValueError, match=r"tp=0.*alpha=2") as error:
        check(config(tp=0, weights=Weights(alpha=2)))
    assert str(error.value).count("\n") == 0
