import torch

from engine.models.batch import packed


def test_packed_lays_whole_sequences_one_after_the_other():
    batch = packed([[5, 6, 7], [8], [9, 10]])
    assert batch.token_ids.tolist() == [5, 6, 7, 8, 9, 10]
    assert batch.positions.tolist() == [0, 1, 2, 0, 0, 1]
    assert batch.query_starts.tolist() == [0, 3, 4, 6] and batch.query_starts.dtype == torch.int32
    assert batch.context_lens.tolist() == [3, 1, 2] and batch.context_lens.dtype == torch.int32
    assert batch.logits_at.tolist() == list(range(6))
    assert batch.page_table.shape == (3, 0) and batch.slots.numel() == 0


def test_packed_takes_a_block_of_tokens():
    block = torch.arange(6).view(2, 3)
    assert packed(block).token_ids.tolist() == list(range(6))
    assert packed(block).query_starts.tolist() == [0, 3, 6]
