import json
from pathlib import Path

import pytest

from engine.runtime.growth import check_growth
from tests.shared_data import shared

FILE = Path("tokenizer.json")
DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
TWICE = {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A"}}] * 2, "pair": [], "special_tokens": {}}


@pytest.mark.parametrize(
    ("section", "inner", "step"),
    [
        ("normalizer", "normalizers", DOUBLE),
        ("normalizer", "normalizers", DOUBLE | {"pattern": {"Regex": ""}, "content": "a"}),
        ("normalizer", "normalizers", DOUBLE | {"pattern": {"String": ""}, "content": "a"}),
        ("normalizer", "normalizers", {"type": "Precompiled"}),
        ("decoder", "decoders", DOUBLE),
        ("pre_tokenizer", "pretokenizers", BYTES),
        ("post_processor", "processors", TWICE),
    ],
)
def test_steps_that_double_a_text_again_and_again_are_refused(section, inner, step):
    with pytest.raises(ValueError, match=rf"tokenizer\.json has a {section} whose steps"):
        check_growth({section: {"type": "Sequence", inner: [step] * 40}}, FILE)
    nested = {"type": "Sequence", inner: [{"type": "Sequence", inner: [step] * 20}] * 2}
    with pytest.raises(ValueError, match=section):
        check_growth({section: nested}, FILE)
    check_growth({section: {"type": "Sequence", inner: [step] * 2}}, FILE)


def test_many_steps_that_change_no_length_are_taken():
    step = DOUBLE | {"content": "b"}
    check_growth({"normalizer": {"type": "Sequence", "normalizers": [step, {"type": "NFC"}] * 100}}, FILE)


@pytest.mark.parametrize("section", [None, 5, "x", [], {"type": "Replace", "content": 5}, {"type": ["Sequence"]}])
def test_what_is_no_section_is_left_to_the_library(section):
    check_growth({"normalizer": section, "decoder": {"decoders": section}, "post_processor": {"single": [5]}}, FILE)


@pytest.mark.parametrize("name", ["internlm2", "llama2", "llama3", "mistral_v0.3", "qwen2_5"])
def test_real_files_are_taken(name):
    path = shared(f"data/tokenizers/{name}/tokenizer.json")
    check_growth(json.loads(path.read_bytes()), path)
