"""What is done with the tokenizer of a damaged folder, in a process of its own."""

from pathlib import Path

from engine.runtime.tokenizer import Tokenizer

TEXT = "<s> the cat, 12 naïve 你好 😀\n\t  <|im_start|>x</s>"
LONG_TEXT = 10_000  # of which a tokenizer takes memory as for any text
# What is said to someone who sent messages: the folder is no business of theirs.
OF_A_REQUEST = ("the model's chat template ", "the text is not valid Unicode")


def tokenizer(folder: Path) -> None:
    opened = Tokenizer(folder)
    ids = opened.encode(TEXT)
    opened.decode(ids)
    opened.decode([0, 1, opened.vocab_size - 1, opened.vocab_size, 2**31 - 1], skip_special=False)
    assert all(type(token) is int for token in [*ids, *opened.eos_token_ids])
    assert all(type(text) is str for text in opened.special_tokens.values())


def chat(folder: Path) -> None:
    opened = Tokenizer(folder)
    try:
        text = opened.chat([{"role": "user", "content": "the cat"}])
        opened.encode(text[:LONG_TEXT])
    except ValueError as error:
        if not str(error).startswith(OF_A_REQUEST):
            raise
        raise ValueError(f"{folder}: {error}") from error
