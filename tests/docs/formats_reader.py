"""A reader of workspaces written from docs/formats.md, in numpy and without the project's code: the text is enough."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float32]


class Reader:
    """`weights` has every tensor by Hugging Face's name, linears dense, `[out, in]`, all in float32."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "triton_models/weights"
        sections = _sections((self._folder / "config.ini").read_text())
        self.ini = sections["llama"]
        self.ingot: dict[str, Any] = {key: json.loads(text) for key, text in sections.get("ingot", {}).items()}
        self.tp, self.heads, self.kv_heads = (self._int(key) for key in ("tensor_para_size", "head_num", "kv_head_num"))
        self.size = self._int("size_per_head")
        self.hidden = self.ingot.get("hidden_size", self.heads * self.size)
        self.group = self._int("group_size")
        self.weights: dict[str, Matrix] = {}
        self._read_outer()
        for layer in range(self._int("num_layer")):
            self._read_layer(layer)

    def kv_scales(self, layer: int) -> Matrix:
        """[kv heads, 4]: scale and zero of K, then of V."""
        runs = self._folder / f"layers.{layer}.past_kv_scale.ranks"
        if runs.exists():
            rows = np.fromfile(runs, dtype="<f4").reshape(-1, 4)
        else:
            files = [self._folder / f"layers.{layer}.past_kv_scale.{rank}.weight" for rank in range(self.tp)]
            rows = np.stack([np.fromfile(file, dtype="<f4") for file in files])
        return np.repeat(rows, self.kv_heads // len(rows), axis=0)

    def channel_scales(self, layer: int) -> Matrix:
        """[kv heads, head size, 4], K's channels in half-split order, where `kv_granularity` is "channel"."""
        planes = np.fromfile(self._folder / f"layers.{layer}.past_kv_scale.channels", dtype="<f4")
        key, value = np.split(planes.reshape(4, self.kv_heads * self.size), 2)
        return np.concatenate([self._half_split(key), value]).reshape(4, self.kv_heads, self.size).transpose(1, 2, 0)

    def frequencies(self, limit: int) -> tuple[NDArray[np.float64], float]:
        """Angle per position of each rotary pair for a sequence that may reach `limit` tokens, and what multiplies cos
        and sin."""
        pairs, size = np.arange(self.size // 2), self.size
        theta, trained = float(self.ini["rope_theta"]), self._int("max_position_embeddings") or 2048
        given = {"factor": 1.0, "original_max_position_embeddings": 0, "low_freq_factor": 1.0, "high_freq_factor": 1.0}
        given |= {"beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": 1.0, "truncate": True}
        given |= self.ingot.get("rope_scaling", {"kind": "none"})
        kind, factor, original = given["kind"], given["factor"], given["original_max_position_embeddings"]
        stretch, over = 1.0, limit > trained
        if float(self.ini["rope_scaling_factor"]) >= 1:
            kind, factor = "turbomind", float(self.ini["rope_scaling_factor"])
        if kind == "qwen":
            stretch = max(2.0 ** math.ceil(math.log2(limit / trained) + 1) - 1, 1.0)
        elif kind == "turbomind" or (kind == "dynamic" and over):
            stretch = factor * limit / trained - (factor - 1) if over else factor
        plain = (theta * stretch ** (size / (size - 2))) ** (-2 * pairs / size)
        if kind == "linear":
            return plain / factor, 1.0
        if kind == "llama3":
            low, high = given["low_freq_factor"], given["high_freq_factor"]
            kept = np.clip((original * plain / (2 * math.pi) - low) / (high - low), 0, 1)
        elif kind == "yarn":
            first, last = (
                size * math.log(original / (2 * math.pi * given[beta])) / (2 * math.log(theta))
                for beta in ("beta_fast", "beta_slow")
            )
            if given["truncate"]:
                first, last = math.floor(first), math.ceil(last)
            first, last = max(first, 0), min(last, size - 1)
            kept = 1 - np.clip((pairs - first) / ((last - first) or 0.001), 0, 1)
        else:
            return plain, 1.0
        return plain * kept + plain / factor * (1 - kept), given["attention_factor"]

    def _int(self, key: str) -> int:
        return int(self.ini[key])

    def _floats(self, name: str, columns: int) -> Matrix:
        if "bf16" in (self.ini["weight_type"], self.ingot.get("float_type")):
            values = (np.fromfile(self._folder / name, dtype="<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            values = np.fromfile(self._folder / name, dtype="<f2").astype(np.float32)
        return values.reshape(-1, columns)

    def _read_outer(self) -> None:
        vocabulary = self._int("vocab_size")
        self.weights["model.embed_tokens.weight"] = self._floats("tok_embeddings.weight", self.hidden)[:vocabulary]
        self.weights["lm_head.weight"] = self._head()[:vocabulary]
        self.weights["model.norm.weight"] = self._floats("norm.weight", self.hidden)[0]

    def _head(self) -> Matrix:
        kind = self.ingot.get("head")
        if kind == "int8":
            rows = np.fromfile(self._folder / "output.weight", dtype=np.int8).reshape(-1, self.hidden)
            return rows.astype(np.float32) * np.fromfile(self._folder / "output.weight_scale", dtype="<f4")[:, None]
        if kind == "int4":
            outputs = -(-self._int("vocab_size") // 32) * 32
            return self._int4("output", self.hidden, outputs, self.group).T
        return self._floats("output.weight", self.hidden)

    def _read_layer(self, layer: int) -> None:
        at, queries, values = f"layers.{layer}.", self.heads * self.size, self.kv_heads * self.size
        inner, found = self._int("inter_size"), {}
        norms = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
        for file, name in norms.items():
            found[f"{name}.weight"] = self._floats(f"{at}{file}.weight", self.hidden)[0]
        if self.ingot.get("qk_norm"):
            for one in "qk":
                norm = self._floats(f"{at}attention.{one}_norm.weight", self.size)
                found[f"self_attn.{one}_norm.weight"] = self._half_split(norm)[0]
        runs = [queries // self.tp, values // self.tp, values // self.tp]
        filled = -(-sum(runs) // 32) * 32 if self.group else sum(runs)
        kinds = ["weight", "bias"] if self._int("attn_bias") else ["weight"]
        for kind in kinds:
            rows, ranks = (self.hidden if kind == "weight" else 1), []
            for rank in range(self.tp):
                whole = self._matrix(f"{at}attention.w_qkv.{rank}", kind, rows, filled, self.group)
                ranks.append(np.split(whole, np.cumsum(runs), axis=1)[:3])
            for one, parts in zip("qkv", zip(*ranks, strict=True), strict=True):
                matrix = np.concatenate(parts, axis=1)
                matrix = matrix if one == "v" else self._half_split(matrix)
                found[f"self_attn.{one}_proj.{kind}"] = matrix.T if kind == "weight" else matrix[0]
        if self._int("attn_bias"):
            found["self_attn.o_proj.bias"] = self._floats(f"{at}attention.wo.0.bias", self.hidden)[0]
        rows = queries // self.tp
        group = math.gcd(self.group, rows)
        stored = -(-rows // math.lcm(group, 32)) * math.lcm(group, 32) if self.group else rows
        wo = [self._matrix(f"{at}attention.wo.{r}", "weight", stored, self.hidden, group) for r in range(self.tp)]
        found["self_attn.o_proj.weight"] = np.concatenate([matrix[:rows] for matrix in wo]).T
        unit = self.tp * (math.lcm(self.group, 32) if self.group else 1)
        share = -(-inner // unit) * unit // self.tp
        down = [
            self._matrix(f"{at}feed_forward.w2.{r}", "weight", share, self.hidden, self.group) for r in range(self.tp)
        ]
        found["mlp.down_proj.weight"] = np.concatenate(down)[:inner].T
        columns: dict[str, list[Matrix]] = {"gate": [], "up": []}
        for rank in range(self.tp):
            if self.group:
                pairs = self._matrix(f"{at}feed_forward.w13.{rank}", "weight", self.hidden, 2 * share, self.group)
                gate, up = pairs[:, ::2], pairs[:, 1::2]
            else:
                gate, up = (
                    self._matrix(f"{at}feed_forward.{w}.{rank}", "weight", self.hidden, share, 0) for w in ("w1", "w3")
                )
            columns["gate"].append(gate)
            columns["up"].append(up)
        for name, parts in columns.items():
            found[f"mlp.{name}_proj.weight"] = np.concatenate(parts, axis=1)[:, :inner].T
        self.weights |= {f"model.layers.{layer}.{name}": tensor for name, tensor in found.items()}

    def _half_split(self, matrix: Matrix) -> Matrix:
        """Columns h D + 2j + b of the file as columns h D + b D/2 + j."""
        back = np.empty_like(matrix)
        for column in range(matrix.shape[1]):
            head, within = divmod(column, self.size)
            j, b = divmod(within, 2)
            back[:, head * self.size + b * self.size // 2 + j] = matrix[:, column]
        return back

    def _matrix(self, stem: str, kind: str, inputs: int, outputs: int, group: int) -> Matrix:
        """`[in, out]`; int4 as (q - z) s, int8 as q s."""
        if kind == "weight" and self.ini["weight_type"] == "int8":
            rows = np.fromfile(self._folder / f"{stem}.weight", dtype=np.int8).reshape(outputs, inputs)
            scales = np.fromfile(self._folder / f"{stem}.weight_scale", dtype="<f4")
            return (rows.astype(np.float32) * scales[:, None]).T
        if kind == "bias" or not self.group:
            return self._floats(f"{stem}.{kind}", outputs)
        return self._int4(stem, inputs, outputs, group)

    def _int4(self, stem: str, inputs: int, outputs: int, group: int) -> Matrix:
        words = np.fromfile(self._folder / f"{stem}.qweight", dtype="<u4")
        k, n = np.arange(inputs)[:, None], np.arange(outputs)[None]
        lane = 4 * (n % 8) + (k % 8) // 2
        part = 2 * ((k % 32) // 16) + (n % 32) // 16
        nibble = 4 * (k % 2) + 2 * ((k % 16) // 8) + (n % 16) // 8
        codes = words[((k // 32 * (outputs // 32) + n // 32) * 32 + lane) * 4 + part] >> (4 * nibble).astype("u4") & 15
        pairs = np.fromfile(self._folder / f"{stem}.scales_zeros", dtype="<f2").astype(np.float32)
        zeros, scales = np.repeat(pairs.reshape(-1, outputs, 2), group, axis=0).transpose(2, 0, 1)
        return (codes.astype(np.float32) - (zeros - 64)) * scales


def _sections(text: str) -> dict[str, dict[str, str]]:
    sections: dict[str, dict[str, str]] = {}
    name = ""
    for line in filter(None, text.splitlines()):
        if line.startswith("["):
            name = line.strip("[]")
        else:
            key, _, value = line.partition(" = ")
            sections.setdefault(name, {})[key] = value
    return sections
