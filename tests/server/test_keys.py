import pytest

from server.keys import read_key_lines


def test_one_key_alone_or_a_line_for_each_caller() -> None:
    assert read_key_lines(" abc:d \n", source="f") == {"default": "abc:d"}
    text = "# staff\nalice: key-1\n\nbob.b:   key:2\nkey-3\n"
    assert read_key_lines(text, source="f") == {"alice": "key-1", "bob.b": "key:2", "default": "key-3"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "does not hold a key"),
        ("# nothing", "does not hold a key"),
        ("secret words", "line 1"),
        ("a: secret\nb: secret words", "line 2"),
        ("a: secret\x00", "line 1"),
        ("ключ", "line 1"),
        ("a: secret\na: secret2", "the name 'a' twice"),
        ("secret\nsecret2", "the name 'default' twice"),
        ("a: secret\nb: secret", "the key of 'b' twice"),
        ("\n".join(f"n{i}: k{i}" for i in range(10_001)), "at most 10000"),
    ],
)
def test_what_is_no_key_is_named_without_it(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_key_lines(text, source="the file")
    assert "secret" not in str(caught.value)
    assert "the file" in str(caught.value)
