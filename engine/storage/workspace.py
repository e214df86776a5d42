"""Writes and reads TurboMind workspaces: canonical tensors in, weight files out, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.config import ModelConfig, Recipe
from engine.models import names
from engine.models.cache import KVScales
from engine.models.decoder import Decoder
from engine.storage import turbomind_files as files
from engine.storage import turbomind_layout as layout
from engine.storage.config_ini import KV_INT8, model_config_of, read_config_ini, weight_type_of
from engine.storage.turbomind_files import Part

WEIGHTS = Path("triton_models/weights")
TOKENIZER = Path("triton_models/tokenizer")
CONFIG_INI = "config.ini"


def write_weights(
    folder: Path, config: ModelConfig, tensor: Callable[[str], Tensor], *, recipe: Recipe, tp: int
) -> dict[str, int]:
    """Write every weight file (not config.ini, not KV scales) into `folder`; returns names and sizes in bytes.

    `tensor` answers with the tensor of a canonical name, [out, in] or in the HF-AWQ layout. It is asked part by part,
    so no more than one part of one layer is in memory. float32 sources are stored as fp16, w4a16 as int4 and fp16.
    Raises ValueError before the first byte when the model does not fit, and for a tensor of a wrong shape or one that
    overflows fp16.
    """
    files.check_fits(config, recipe, tp)
    sizes = files.file_bytes(config, recipe, tp)
    dtype = files.FLOAT_TYPES[weight_type_of(config, recipe)]
    folder.mkdir(parents=True, exist_ok=True)

    def ask(name: str, shape: tuple[int, ...]) -> Tensor:
        found = tensor(name)
        if tuple(found.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(found.shape)}; the model needs {shape}")
        return found if not found.is_floating_point() else _cast(found, dtype, name)

    def write(name: str, stored: Tensor) -> None:
        path = folder / name
        stored.contiguous().view(torch.uint8).numpy().tofile(path)
        _check_size(path, sizes[name])

    shapes = names.model_tensors(config)
    for name, canonical in files.OUTER_FILES.items():
        source = names.EMBEDDING if config.tie_word_embeddings and canonical == names.HEAD else canonical
        whole = ask(source, shapes[source])
        write(name, layout.pad_rows(whole, tp) if canonical != names.FINAL_NORM else whole)
    for layer in range(config.num_layers):
        for name, within in files.NORM_FILES.items():
            write(files.layer_file(layer, name), ask(names.layer_name(layer, within), (config.hidden_size,)))
        for part in files.parts_of(recipe):
            for kind in files.kinds_of(config, recipe, part):
                for rank, stored in enumerate(_rank_tensors(config, part, kind, layer, ask, recipe, tp)):
                    write(files.rank_file(layer, part, rank, kind), stored)
    return sizes


def write_kv_scales(folder: Path, layer: int, scales_per_rank: Sequence[Sequence[float]]) -> None:
    """Write (k_scale, k_zero, v_scale, v_zero) of every rank as float32; ValueError when a scale is not above 0."""
    for rank, row in enumerate(scales_per_rank):
        values = np.asarray(row, dtype="<f4")
        if values.shape != (4,) or not np.isfinite(values).all() or values[0] <= 0 or values[2] <= 0:
            raise ValueError(
                f"KV scales of layer {layer}, rank {rank} are {values.tolist()}: they must be four finite numbers "
                "(K scale, K zero point, V scale, V zero point) with scales above 0"
            )
        values.tofile(folder / files.kv_scale_file(layer, rank))


class Workspace:
    """A TurboMind workspace opened for reading, its ranks merged into canonical tensors.

    Files are mapped, not loaded. Opening checks that every file is there with its right size: ValueError or
    FileNotFoundError names the file, the bytes expected and the bytes found.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer_folder = folder / TOKENIZER
        self._weights = folder / WEIGHTS
        if not (self._weights / CONFIG_INI).is_file():
            raise FileNotFoundError(f"{folder} is not a TurboMind workspace: it has no {WEIGHTS / CONFIG_INI}")
        self.ini = read_config_ini(self._weights / CONFIG_INI)
        self.tp = self.ini.tensor_para_size
        self.config = model_config_of(self.ini, self._weights / CONFIG_INI)
        self.recipe = Recipe(
            weights="w4a16" if self.ini.weight_type == "int4" else "fp16",
            kv="kv8" if self.ini.quant_policy == KV_INT8 else "kv16",
            group_size=self.ini.group_size,
        )
        files.check_fits(self.config, self.recipe, self.tp)
        for name, size in files.file_bytes(self.config, self.recipe, self.tp).items():
            _check_size(self._weights / name, size)
        self._last: tuple[int, Part, dict[str, Tensor]] | None = None

    def names(self) -> list[str]:
        """The canonical names of all tensors, in the order in which reading them touches every file once."""
        within = [*files.NORM_FILES.values()]
        for part in files.parts_of(self.recipe):
            kinds = names.QUANTIZED if self.recipe.weights == "w4a16" else ("weight",)
            kinds = (*kinds, "bias") if names.has_bias(self.config, part.modules[0]) else kinds
            within += [f"{module}.{kind}" for module in part.modules for kind in kinds]
        layers = range(self.config.num_layers)
        return [*files.OUTER_FILES.values(), *(names.layer_name(layer, name) for layer in layers for name in within)]

    def tensor(self, name: str) -> Tensor:
        """The whole tensor of a canonical name, Q and K in half-split rotary order, int4 in the HF-AWQ layout."""
        layer, within = names.split_name(name)
        hidden = self.config.hidden_size
        for file, canonical in files.OUTER_FILES.items():
            if name == canonical:
                whole = self._map(file)
                return whole if canonical == names.FINAL_NORM else whole.view(-1, hidden)[: self.config.vocab_size]
        for file, canonical in files.NORM_FILES.items():
            if layer is not None and within == canonical:
                return self._map(files.layer_file(layer, file))
        for part in files.parts_of(self.recipe):
            if layer is not None and within.rpartition(".")[0] in part.modules:
                tensors = self._part(layer, part)
                if within in tensors:
                    return tensors[within]
        raise ValueError(f"{self.folder} has no tensor {name!r}")

    def weights(self) -> Mapping[str, Tensor]:
        """All tensors by canonical name, read when asked for."""
        return _Weights(self)

    def kv_scales(self) -> KVScales | None:
        """Scale and zero point per layer and KV head (a rank's pair repeated); None for a kv16 workspace.

        The reference takes scale 1 for a missing file and says nothing; here it is an error.
        """
        if self.recipe.kv == "kv16":
            return None
        rows = []
        for layer in range(self.config.num_layers):
            for rank in range(self.tp):
                path = self._weights / files.kv_scale_file(layer, rank)
                _check_size(path, files.KV_SCALE_BYTES)
                rows.append(np.fromfile(path, dtype="<f4"))
        ranks = torch.from_numpy(np.stack(rows).astype(np.float32)).view(self.config.num_layers, self.tp, 2, 2)
        heads = ranks.repeat_interleave(self.config.num_kv_heads // self.tp, dim=1)
        return KVScales(key=heads[:, :, 0].contiguous(), value=heads[:, :, 1].contiguous())

    def _map(self, name: str) -> Tensor:
        path = self._weights / name
        dtype = files.FLOAT_TYPES[self.ini.weight_type]
        if name.endswith((".qweight", ".scales_zeros")):
            dtype = torch.int32
        # Private: the pages come from the file, and a write to the tensor could not reach it.
        return torch.from_file(str(path), shared=False, size=path.stat().st_size // dtype.itemsize, dtype=dtype)

    def _part(self, layer: int, part: Part) -> dict[str, Tensor]:
        # The last part is kept, because its q, k and v (or codes, zeros and scales) are asked for one after the other.
        if self._last is None or self._last[:2] != (layer, part):
            self._last = None
            try:
                self._last = (layer, part, self._read_part(layer, part))
            except ValueError as error:
                raise ValueError(f"{self._weights / files.layer_file(layer, part.stem)}.*: {error}") from error
        return self._last[2]

    def _read_part(self, layer: int, part: Part) -> dict[str, Tensor]:
        inputs, outputs = files.matrix_shape(self.config, part, self.tp)
        columns = [names.linear_shape(self.config, module)[0] for module in part.modules]

        def ranks(kind: str) -> Iterator[Tensor]:
            return (self._map(files.rank_file(layer, part, rank, kind)) for rank in range(self.tp))

        def join(matrices: Sequence[Tensor], kind: str) -> dict[str, Tensor]:
            whole = layout.join_ranks(matrices, columns, cut=part.cut(kind), join=part.join)
            return {
                module: layout.separate_rotary(matrix, self.config.head_dim) if module in part.rotary else matrix
                for module, matrix in zip(part.modules, whole, strict=True)
            }

        tensors: dict[str, Tensor] = {}
        for kind in files.kinds_of(self.config, self.recipe, part):
            if kind == "weight":
                matrices = join([rank.view(inputs, outputs) for rank in ranks(kind)], kind)
                tensors |= {f"{module}.weight": matrix.t().contiguous() for module, matrix in matrices.items()}
            elif kind == "bias":
                matrices = join([rank.view(1, outputs) for rank in ranks(kind)], kind)
                tensors |= {f"{module}.bias": matrix[0] for module, matrix in matrices.items()}
            elif kind == "qweight":
                matrices = join([layout.unpack_tiles(rank, inputs, outputs) for rank in ranks(kind)], kind)
                tensors |= {f"{module}.qweight": layout.pack_awq(matrix) for module, matrix in matrices.items()}
            else:
                pairs = [layout.unpack_scales_zeros(rank.view(-1, outputs)) for rank in ranks(kind)]
                scales, zeros = (join(list(matrices), kind) for matrices in zip(*pairs, strict=True))
                tensors |= {f"{module}.qzeros": layout.pack_awq(matrix) for module, matrix in zeros.items()}
                tensors |= {f"{module}.scales": matrix.contiguous() for module, matrix in scales.items()}
        return tensors


class _Weights(Mapping[str, Tensor]):
    """The tensors of a workspace as a mapping that holds none of them."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._names = dict.fromkeys(workspace.names())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._workspace.tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def load_workspace(folder: Path, *, device: torch.device | str, dtype: torch.dtype) -> Decoder:
    """The model of a workspace, ready to run; any tp loads, bit-equal."""
    workspace = Workspace(folder)
    return Decoder(workspace.config, workspace.weights(), device=device, dtype=dtype)


def _rank_tensors(
    config: ModelConfig,
    part: Part,
    kind: str,
    layer: int,
    ask: Callable[[str, tuple[int, ...]], Tensor],
    recipe: Recipe,
    tp: int,
) -> list[Tensor]:
    """What the files of one kind of a part hold, rank by rank."""

    def gather(source: str) -> list[Tensor]:
        matrices = []
        for module in part.modules:
            outputs, inputs = names.linear_shape(config, module)
            groups = inputs // max(recipe.group_size, 1)
            shape = {
                "weight": (outputs, inputs),
                "bias": (outputs,),
                "qweight": (inputs, outputs // 8),
                "qzeros": (groups, outputs // 8),
                "scales": (groups, outputs),
            }[source]
            found = ask(names.layer_name(layer, f"{module}.{source}"), shape)
            if source in ("qweight", "qzeros"):
                matrix = layout.unpack_awq(found)
            else:
                matrix = {"weight": found.t(), "bias": found.reshape(1, -1)}.get(source, found)
            matrices.append(layout.interleave_rotary(matrix, config.head_dim) if module in part.rotary else matrix)
        return layout.split_ranks(matrices, tp, cut=part.cut(kind), join=part.join)

    if kind == "qweight":
        return [layout.pack_tiles(codes) for codes in gather("qweight")]
    if kind == "scales_zeros":
        pairs = zip(gather("scales"), gather("qzeros"), strict=True)
        return [layout.pack_scales_zeros(scales, zeros) for scales, zeros in pairs]
    return gather(kind)


def _cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    if tensor.dtype == dtype:
        return tensor
    cast = tensor.to(dtype)
    if not bool(cast.isfinite().all()):
        raise ValueError(f"{name} holds values that {dtype} cannot (largest {tensor.abs().max().item():g})")
    return cast


def _check_size(path: Path, expected: int) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; it should be there with {expected} bytes")
    if (found := path.stat().st_size) != expected:
        raise ValueError(f"{path} has {found} bytes where {expected} are expected: it is damaged or of another model")
