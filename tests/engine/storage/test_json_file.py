import pytest

from engine.storage.json_file import DEEPEST, parse_object, read_object


def test_an_object_is_read_as_it_is(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": [1, 0.5, "\\ud83d\\ude00", null]}')
    assert read_object(tmp_path / "a.json") == {"a": [1, 0.5, "😀", None]}


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "is not valid JSON"),
        (b'{"a": ', "is not valid JSON"),
        (b'{"a": "\xff"}', "is not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not valid JSON"),
        (b"[]", "holds a JSON list, not an object"),
        (b'{"a": ' + b"[" * DEEPEST + b"]" * DEEPEST + b"}", f"nested more than {DEEPEST} deep"),
        (b'{"a": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", f"nested more than {DEEPEST} deep"),
        (b'{"a": "\\ud800"}', "half of a surrogate pair"),
        (b'{"\\ude00\\ud83d": 1}', "half of a surrogate pair"),
    ],
)
def test_what_is_no_object_is_refused_naming_the_file(tmp_path, raw, words):
    (tmp_path / "a.json").write_bytes(raw)
    with pytest.raises(ValueError, match=words) as error:
        read_object(tmp_path / "a.json")
    assert str(error.value).startswith(f"{tmp_path / 'a.json'} ") and len(str(error.value)) < 500


def test_as_deep_as_is_allowed():
    assert parse_object(b'{"a": ' + b"[" * (DEEPEST - 1) + b"]" * (DEEPEST - 1) + b"}")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_object(tmp_path / "a.json")
