"""Beside the reference's own loops, written down once more with the generators that it calls by name."""

import hashlib
import random

import pytest
import torch

from engine.runtime.tokenizer import Tokenizer
from pipelines.data.reference_sampling import reference_blocks
from pipelines.data.texts import read_rows
from tests.shared_data import shared

BOS = 1


def encode(text):
    """A token a character, and BOS once at the start: what the reference counts on."""
    return [BOS, *map(ord, text)]


def blocks(name, rows, *, samples, length):
    return reference_blocks(name, rows, encode, samples=samples, sequence_length=length).tolist()


def some_rows(count, longest, seed=5):
    generator = random.Random(seed)
    return ["".join(generator.choices("abcdefgh ", k=generator.randint(0, longest))) for _ in range(count)]


@pytest.mark.parametrize("name", ["wikitext2", "ptb"])
def test_wikitext2_and_ptb_are_windows_of_all_rows_joined_with_one_bos(name):
    rows = ["", " = Title = \n", "", " Some text .\n", *some_rows(30, 60)]
    tokens = [BOS, *map(ord, "\n\n".join(rows))]
    random.seed(0)
    expected = []
    for _ in range(9):
        start = random.randint(0, len(tokens) - 64)
        expected.append(tokens[start : start + 64])
    assert blocks(name, rows, samples=9, length=64) == expected


def test_a_text_of_exactly_one_block():
    assert blocks("ptb", ["abc"], samples=3, length=4) == [encode("abc")] * 3
    with pytest.raises(ValueError, match=r"no block of calibration.sequence_length=5: ptb has 4 tokens"):
        blocks("ptb", ["abc"], samples=3, length=5)


def test_c4_draws_documents_until_one_is_long_enough_and_may_draw_one_twice():
    rows = some_rows(12, 90)
    assert sum(len(encode(row)) < 40 for row in rows) >= 3
    random.seed(0)
    expected, drawn = [], []
    for _ in range(20):
        while True:
            number = random.randint(0, len(rows) - 1)
            tokens = encode(rows[number])
            if len(tokens) >= 40:
                break
        drawn.append(number)
        start = random.randint(0, len(tokens) - 40)
        expected.append(tokens[start : start + 40])
    assert len(set(drawn)) < len(drawn)
    assert blocks("c4", rows, samples=20, length=40) == expected


def test_c4_without_a_long_document_ends_where_the_reference_does_not():
    with pytest.raises(ValueError, match=r"sequence_length=100: no row of c4 has as many tokens \(12 rows\)"):
        blocks("c4", some_rows(12, 90), samples=1, length=100)


def test_pileval_joins_short_shuffled_documents_and_makes_as_many_blocks_as_they_give():
    datasets = pytest.importorskip("datasets")
    rows = ["  ", *(f"\n {row} \t" for row in some_rows(40, 150)), "x" * 512, "y" * 511]
    tokens, taken = [], 0
    for row in datasets.Dataset.from_dict({"text": rows}).shuffle(seed=0)["text"]:
        one = encode(row.strip())
        if len(one) > 512:
            continue
        tokens += one
        taken += 1
        if taken == 10:
            break
    count = len(tokens) // 128
    assert 1 < count < 10
    assert blocks("pileval", rows, samples=10, length=128) == [
        tokens[number * 128 : (number + 1) * 128] for number in range(count)
    ]


def test_pileval_drops_what_is_too_long_and_what_is_empty():
    def no_bos(text):
        return list(map(ord, text))

    drawn = reference_blocks("pileval", ["", "a" * 513, "b" * 512], no_bos, samples=3, sequence_length=512)
    assert drawn.tolist() == [[ord("b")] * 512]
    with pytest.raises(ValueError, match=r"1 rows of pileval with at most 512 tokens have 512 tokens"):
        reference_blocks("pileval", ["", "b" * 512], no_bos, samples=3, sequence_length=513)


def test_python_s_own_generator_is_left_alone():
    random.seed(11)
    before = random.getstate()
    blocks("c4", some_rows(12, 90), samples=4, length=40)
    blocks("ptb", some_rows(12, 90), samples=4, length=40)
    assert random.getstate() == before


@pytest.mark.parametrize(
    ("name", "file", "split", "column", "first", "digest"),
    [
        (
            "wikitext2",
            "wiki.valid.raw",
            "validation",
            "text",
            "Dirty Bastard on a large projection screen behind the stage",
            "2b9eb9f1095d5e4199e798a6c5949b949f2253ddbf20a3b47c9a7a9801481785",
        ),
        (
            "ptb",
            "ptb.valid.txt",
            "validation",
            "sentence",
            "\n\nthe pilots could play   by not",
            "89a9e6fd990be27e66a81839085aa3fc1b83d1b6208cc660bcf4744cdb556528",
        ),
        (
            "c4",
            "c4_sample_1000.jsonl",
            "train",
            "text",
            "liers. I did not have any problems with my order,",
            "06c9aacd5151ffe05014ab1bdbb10a96e6d7285abae119d62766f6ee84da057d",
        ),
    ],
)
def test_blocks_of_real_copies_do_not_change(name, file, split, column, first, digest):
    tokenizer = Tokenizer(shared("data/models/stories15M-llama"))
    record = {"kind": "dataset", "name": name, "digest": "0" * 64, "split": split, "column": column}
    rows = read_rows(record, locate=lambda _: shared("data/text") / file)
    drawn = reference_blocks(name, rows, tokenizer.encode, samples=8, sequence_length=128)
    assert drawn.shape == (8, 128) and drawn.dtype == torch.int32
    assert tokenizer.decode(drawn[0, :12].tolist()) == first
    assert hashlib.sha256(drawn.numpy().tobytes()).hexdigest() == digest
