import hashlib
import json
import struct

import pytest
import torch

from engine.runtime.tokenizer import Tokenizer
from pipelines import sources
from pipelines.data.blocks import token_blocks
from pipelines.data.calibration_set import blocks_digest, calibration_set
from pipelines.data.reference_sampling import reference_blocks
from tests.tiny_artifact import TEMPLATE, write_tokenizer

WORDS = ["the", "cat", "sat", "on", "the", "mat", "and", "a", "dog", "ran", "to", "it", "in", "the", "rain"]
ROWS = [" ".join(WORDS[i % 7 :] + WORDS[: i % 5]) + "." for i in range(40)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, chat_template=TEMPLATE)
    return Tokenizer(folder)


@pytest.fixture
def known(tmp_path):
    """Records of a text, a chat and a data set, and how they are found."""
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in ROWS))
    chat = [[{"role": "user", "content": row}, {"role": "assistant", "content": row[::-1]}] for row in ROWS]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in chat))
    (tmp_path / "train.txt").write_text("\n".join(ROWS) + "\n\n")
    kinds = {
        "text": ({"kind": "text"}, "text.jsonl", {"column": "text"}),
        "chat": ({"kind": "chat"}, "chat.jsonl", {"column": "messages"}),
        "ptb": ({"kind": "dataset", "name": "ptb"}, "train.txt", {"split": "train", "column": "sentence"}),
    }
    records, places = {}, {}
    for name, (record, file, how) in kinds.items():
        record = {**record, "digest": sources.measure(record, tmp_path / file, sources.sha256_file)}
        records[name] = {**record, **how}
        places[sources.identity(records[name])] = tmp_path / file
    return records, lambda record: places[sources.identity(record)]


def calibration(**what):
    return {"samples": 12, "sequence_length": 16, "sampling": "random", "seed": 3, **what}


def test_one_text(known, tokenizer):
    records, locate = known
    blocks, about = calibration_set(calibration(text=records["text"]), tokenizer, locate=locate)
    expected = token_blocks(ROWS, tokenizer.encode, samples=12, sequence_length=16, sampling="random", seed=3)
    assert torch.equal(blocks, expected)
    assert about == {
        "blocks": blocks_digest(blocks),
        "tokenizer": sources.tokenizer_digest(tokenizer.folder),
        "template": None,
        "sources": {"text": {"source": sources.identity(records["text"]), "blocks": 12}},
    }


def test_chats_are_encoded_as_the_template_wrote_them_with_no_second_bos(known, tokenizer):
    records, locate = known
    how = calibration(text=records["chat"], sampling="first")
    blocks, about = calibration_set(how, tokenizer, locate=locate)
    first = tokenizer.encode_chat(
        [{"role": "user", "content": ROWS[0]}, {"role": "assistant", "content": ROWS[0][::-1]}],
        add_generation_prompt=False,
    )
    ids = blocks.flatten().tolist()
    assert ids[: len(first)] == first and first.count(tokenizer.bos_token_id) == 1
    assert ids[len(first)] == tokenizer.bos_token_id
    assert about["template"] == hashlib.sha256(TEMPLATE.encode()).hexdigest()


def test_a_mixture_is_its_parts_by_name_each_with_its_share(known, tokenizer):
    records, locate = known
    parts = {
        "web": {"text": records["text"], "weight": 1.0},
        "chats": {"text": records["chat"], "weight": 3.0},
    }
    how = calibration(parts=parts, sampling="first")
    blocks, about = calibration_set(how, tokenizer, locate=locate)
    assert {name: part["blocks"] for name, part in about["sources"].items()} == {"chats": 9, "web": 3}
    for name, part, rows in (("web", "text", slice(9, 12)), ("chats", "chat", slice(0, 9))):
        one = calibration(text=records[part], sampling="first", samples=about["sources"][name]["blocks"])
        assert torch.equal(blocks[rows], calibration_set(one, tokenizer, locate=locate)[0])
    turned = calibration(parts=dict(reversed(parts.items())), sampling="first")
    again, same = calibration_set(turned, tokenizer, locate=locate)
    assert torch.equal(again, blocks) and same == about


def test_a_part_that_is_too_short_is_named_by_its_key(known, tokenizer):
    records, locate = known
    parts = {
        "web": {"text": records["text"], "weight": 9.0},
        "chats": {"text": records["chat"], "weight": 1.0},
    }
    with pytest.raises(ValueError, match=r"calibration\.parts\.web has \d+ tokens: .* 900 of calibration\.samples"):
        calibration_set(calibration(parts=parts, samples=1000), tokenizer, locate=locate)


def test_the_reference_s_sampling_takes_a_data_set_s_rows(known, tokenizer):
    records, locate = known
    how = {"samples": 5, "sequence_length": 16, "sampling": "reference", "text": records["ptb"]}
    blocks, about = calibration_set(how, tokenizer, locate=locate)
    rows = [*ROWS, ""]  # an empty line is a row
    assert torch.equal(blocks, reference_blocks("ptb", rows, tokenizer.encode, samples=5, sequence_length=16))
    assert about["sources"]["text"]["blocks"] == 5


def test_pileval_may_make_fewer_blocks_and_says_so(known, tokenizer, capsys):
    records, locate = known
    record = {**records["text"], "kind": "dataset", "name": "pileval", "split": None}
    how = {"samples": 30, "sequence_length": 64, "sampling": "reference", "text": record}
    blocks, about = calibration_set(how, tokenizer, locate=lambda _: locate(records["text"]))
    assert 0 < len(blocks) < 30 and about["sources"]["text"]["blocks"] == len(blocks)
    assert f"the reference makes {len(blocks)} blocks of 30 documents" in capsys.readouterr().err


def test_the_digest_of_blocks_is_over_little_endian_tokens():
    blocks = torch.tensor([[1, 2], [70000, 4]], dtype=torch.int32)
    assert blocks_digest(blocks) == hashlib.sha256(struct.pack("<4i", 1, 2, 70000, 4)).hexdigest()
    assert blocks_digest(blocks.t().contiguous()) != blocks_digest(blocks) == blocks_digest(blocks.t().t())
