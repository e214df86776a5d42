from pathlib import Path

import pytest

from engine.runtime.added_tokens import LARGEST_ID, AddedToken, read_added_tokens

FOLDER = Path("model")


def test_tokens_come_in_the_order_of_their_ids():
    entries = {
        "10": {"content": "b", "special": True, "lstrip": 1},
        "9": {"content": "a"},
        str(LARGEST_ID): {"content": "c"},
    }
    found = read_added_tokens({"added_tokens_decoder": entries}, FOLDER)
    assert list(found.items()) == [
        (9, AddedToken(content="a")),
        (10, AddedToken(content="b", special=True, lstrip=True)),
        (LARGEST_ID, AddedToken(content="c")),
    ]
    assert read_added_tokens({}, FOLDER) == read_added_tokens({"added_tokens_decoder": None}, FOLDER) == {}


@pytest.mark.parametrize(
    "entries",
    [
        *([1], "a", 5),
        *({key: {"content": "a"}} for key in ("", "-1", "1.0", "a", " 1", "١", "1_0", str(LARGEST_ID + 1), "9" * 5000)),
        *({"1": entry} for entry in (None, "a", [], {}, {"content": ""}, {"content": None}, {"content": ["a"]})),
    ],
)
def test_what_has_no_id_or_no_text_is_refused_naming_the_file(entries):
    with pytest.raises(ValueError, match=r"model/tokenizer_config\.json") as error:
        read_added_tokens({"added_tokens_decoder": entries}, FOLDER)
    assert len(str(error.value)) < 600
