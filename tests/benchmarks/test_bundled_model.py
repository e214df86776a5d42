import json
import struct

import numpy as np
import torch

from benchmarks.bundled_model import half_split, read_gguf, write_checkpoint
from engine.models.batch import packed
from engine.runtime.tokenizer import Tokenizer
from engine.storage.checkpoint import Checkpoint, load_checkpoint

HIDDEN, INNER, HEADS, KV_HEADS = 64, 96, 4, 2
TOKENS = ["<unk>", "<|im_start|>", "<|im_end|>", *(chr(c) for c in range(ord("a"), ord("z") + 1)), "Ġ", "ab"]


def text(value):
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def field(name, value):
    if isinstance(value, str):
        return text(name) + struct.pack("<I", 8) + text(value)
    if isinstance(value, float):
        return text(name) + struct.pack("<If", 6, value)
    if isinstance(value, list):
        kind, items = (8, map(text, value)) if isinstance(value[0], str) else (5, (struct.pack("<i", v) for v in value))
        return text(name) + struct.pack("<IIQ", 9, kind, len(value)) + b"".join(items)
    return text(name) + struct.pack("<II", 4, value)


def q4_1(values):
    """Bytes, and the numbers that they stand for."""
    groups = values.reshape(-1, 32)
    low = groups.min(axis=1).astype("<f2")
    scale = ((groups.max(axis=1) - low) / 15).astype("<f2")
    wide = scale.astype("f4")[:, None]
    codes = np.clip(np.round((groups - low.astype("f4")[:, None]) / wide), 0, 15).astype("u1")
    blocks = np.zeros(len(groups), [("d", "<f2"), ("m", "<f2"), ("q", "u1", 16)])
    blocks["d"], blocks["m"], blocks["q"] = scale, low, codes[:, :16] | codes[:, 16:] << 4
    return blocks.tobytes(), (codes * wide + low.astype("f4")[:, None]).reshape(values.shape)


def q8_0(values):
    groups = values.reshape(-1, 32)
    scale = (np.abs(groups).max(axis=1) / 127).astype("<f2")
    codes = np.round(groups / scale.astype("f4")[:, None]).astype("i1")
    blocks = np.zeros(len(groups), [("d", "<f2"), ("q", "i1", 32)])
    blocks["d"], blocks["q"] = scale, codes
    return blocks.tobytes(), (codes * scale.astype("f4")[:, None]).reshape(values.shape)


def a_gguf():
    """A file of a random Llama of one layer, and its tensors as they stand in the file."""
    random = np.random.default_rng(0)
    shapes = {
        "token_embd": (len(TOKENS), HIDDEN),
        "blk.0.attn_q": (HIDDEN, HIDDEN),
        "blk.0.attn_k": (HIDDEN // 2, HIDDEN),
        "blk.0.attn_v": (HIDDEN // 2, HIDDEN),
        "blk.0.attn_output": (HIDDEN, HIDDEN),
        "blk.0.ffn_gate": (INNER, HIDDEN),
        "blk.0.ffn_up": (INNER, HIDDEN),
        "blk.0.ffn_down": (HIDDEN, INNER),
        **dict.fromkeys(("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"), (HIDDEN,)),
    }
    fields = {
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": INNER,
        "llama.block_count": 1,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.context_length": 128,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3, 3, 3, *[1] * (len(TOKENS) - 3)],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": "{{ messages[0].content }}",
    }
    infos, data, stand = b"", b"", {}
    for name, shape in shapes.items():
        values = random.standard_normal(shape).astype("f4") * 0.2
        kind, (raw, stand[name]) = {
            1: (0, (values.tobytes(), values)),
            2: (8, q8_0(values)) if name == "token_embd" else (3, q4_1(values)),
        }[len(shape)]
        data += b"\0" * (-len(data) % 32)
        sizes = struct.pack(f"<{len(shape)}Q", *shape[::-1])
        infos += text(f"{name}.weight") + struct.pack("<I", len(shape)) + sizes + struct.pack("<IQ", kind, len(data))
        data += raw
    head = b"GGUF" + struct.pack("<IQQ", 3, len(shapes), len(fields))
    head += b"".join(field(name, value) for name, value in fields.items()) + infos
    return head + b"\0" * (-len(head) % 32) + data, stand


def test_tensors_are_what_the_blocks_stand_for():
    gguf, stand = a_gguf()
    fields, tensors = read_gguf(gguf)
    assert fields["tokenizer.ggml.tokens"] == TOKENS and fields["llama.block_count"] == 1
    for name, values in stand.items():
        np.testing.assert_array_equal(tensors[f"{name}.weight"], values, err_msg=name)


def test_rotary_pairs_that_are_neighbours_become_halves():
    rows = np.arange(16.0)[:, None].repeat(2, axis=1)
    assert half_split(rows, 2)[:, 0].tolist() == [0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15]


def test_the_checkpoint_is_read_by_the_engine(tmp_path):
    gguf, stand = a_gguf()
    write_checkpoint(gguf, tmp_path / "model")
    checkpoint = Checkpoint(tmp_path / "model")
    assert checkpoint.config.tie_word_embeddings and checkpoint.config.num_kv_heads == KV_HEADS
    up = torch.from_numpy(stand["blk.0.ffn_up"]).half()
    assert torch.equal(checkpoint.tensor("model.layers.0.mlp.up_proj.weight"), up)
    queries = torch.from_numpy(half_split(stand["blk.0.attn_q"], HEADS)).half()
    assert torch.equal(checkpoint.tensor("model.layers.0.self_attn.q_proj.weight"), queries)
    logits = load_checkpoint(tmp_path / "model")(packed([[3, 4, 5]]), None)
    assert logits.shape == (3, len(TOKENS)) and bool(logits.isfinite().all())
    tokenizer = Tokenizer(tmp_path / "model")
    assert tokenizer.encode("abz<|im_end|>") == [TOKENS.index("ab"), TOKENS.index("z"), 2]
    assert json.loads((tmp_path / "model/tokenizer_config.json").read_text())["eos_token"] == "<|im_end|>"
