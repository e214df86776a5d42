from dataclasses import replace

import pytest

from engine.runtime.tokenizer import Tokenizer
from pipelines.token_ids import with_token_ids
from tests.engine.storage.tiny_workspace import SMALL
from tests.tiny_artifact import write_tokenizer


@pytest.fixture
def tokenizer(tmp_path):
    write_tokenizer(tmp_path, chat_template=None)
    return Tokenizer(tmp_path)


def test_what_the_configuration_names_stays(tokenizer):
    assert with_token_ids(SMALL, tokenizer) is not SMALL and with_token_ids(SMALL, tokenizer) == SMALL


def test_what_it_does_not_name_is_the_tokenizers(tokenizer):
    silent = with_token_ids(replace(SMALL, bos_token_id=None, eos_token_ids=()), tokenizer)
    assert (silent.bos_token_id, silent.eos_token_ids) == (0, (1,))


def test_a_tokenizer_without_bos_leaves_none(tmp_path, tokenizer):
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    without = with_token_ids(replace(SMALL, bos_token_id=None, eos_token_ids=(7,)), Tokenizer(tmp_path))
    assert (without.bos_token_id, without.eos_token_ids) == (None, (7,))
