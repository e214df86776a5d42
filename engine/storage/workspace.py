"""Writes and reads TurboMind workspaces: canonical tensors in, weight files out, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from engine.config import ModelConfig, Recipe
from engine.models import names
from engine.models.cache import KVScales, PerToken
from engine.models.decoder import Decoder
from engine.storage import head_files
from engine.storage import turbomind_files as files
from engine.storage import turbomind_layout as layout
from engine.storage.artifacts import FileEntry
from engine.storage.config_ini import RECIPE_OF, model_config_of, read_config_ini
from engine.storage.file_stream import FileStream
from engine.storage.file_writer import BLOCK_BYTES, FileWriter
from engine.storage.ini_keys import KV_INT8
from engine.storage.kv_scale_files import read_scales
from engine.storage.lazy_tensors import LazyTensors
from engine.storage.parts import cast, join_part, split_part
from engine.storage.rank_cuts import rank_config, rank_cut
from engine.storage.rank_weights import RankWeights, rank_scales
from engine.storage.turbomind_files import Part

WEIGHTS = Path("triton_models/weights")
TOKENIZER = Path("triton_models/tokenizer")
CONFIG_INI = "config.ini"


def weight_paths(folder: Path) -> list[str]:
    """The paths within the folder of what `Workspace.stream` streams: weights, and neither config.ini nor KV scales."""
    return [
        str(WEIGHTS / path.name)
        for path in sorted((folder / WEIGHTS).glob("*"))
        if path.name != CONFIG_INI and ".past_kv_scale." not in path.name
    ]


def write_weights(
    folder: Path,
    config: ModelConfig,
    tensor: Callable[[str], Tensor],
    *,
    recipe: Recipe,
    tp: int,
    progress: Callable[[int], object] | None = None,
) -> list[FileEntry]:
    """Write every weight file (not config.ini, not KV scales) into `folder`; returns name, size and SHA-256 of each.

    `tensor` answers with the tensor of a canonical name, [out, in] (int8 for w8a8) or in the HF-AWQ layout. It is asked
    file by file and what it answers is cut, turned and written block by block, so that memory is what one file is made
    of and a few blocks. float32 sources are stored as fp16, w4a16 as int4 and fp16, w8a8 as int8 with float32 scales
    and fp16 or bf16. `progress` is told the bytes written.
    Raises ValueError before the first byte when the model does not fit, and for a tensor of a wrong shape or one that
    overflows fp16.
    """
    files.check_fits(config, recipe, tp)
    dtype = files.float_type(config, recipe)
    shapes = names.model_tensors(config)
    folder.mkdir(parents=True, exist_ok=True)

    def ask(name: str, shape: tuple[int, ...]) -> Tensor:
        found = tensor(name)
        if tuple(found.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(found.shape)}; the model needs {shape}")
        return found

    with FileWriter(folder, files.file_bytes(config, recipe, tp), progress=progress) as writer:
        quantized_head = recipe.head != "fp16"
        for name, canonical in files.OUTER_FILES.items():
            if canonical == names.HEAD and quantized_head:
                for file, block in head_files.head_blocks(config, recipe, ask, tp=tp):
                    writer.append(file, _data(block))
                continue
            source = names.EMBEDDING if config.tie_word_embeddings and canonical == names.HEAD else canonical
            rows = ask(source, shapes[source])
            for some in torch.split(rows, max(BLOCK_BYTES // (dtype.itemsize * rows[0].numel()), 1)):
                writer.append(name, _data(cast(some, dtype, source)))
            if canonical != names.FINAL_NORM and (missing := -rows.shape[0] % tp):
                writer.append(name, _data(torch.zeros(missing, config.hidden_size, dtype=dtype)))
            del rows, some  # mapped, or made, until here: the next one would come on top
            writer.settle()
        for layer in range(config.num_layers):
            for name, (within, values) in files.norm_files(config).items():
                canonical = names.layer_name(layer, within)
                norm = cast(ask(canonical, (values,)), dtype, canonical)
                if name in files.HEAD_NORM_FILES:
                    norm = layout.interleave_rotary(norm[None], config.head_dim)[0]
                writer.append(files.layer_file(layer, name), _data(norm))
            for part in files.parts_of(recipe):
                for kind in files.kinds_of(config, recipe, part):
                    for rank, block in split_part(config, recipe, part, kind, layer, ask, tp=tp):
                        writer.append(files.rank_file(layer, part, rank, kind), _data(block))
            writer.settle()
    return writer.entries


def weight_bytes(config: ModelConfig, recipe: Recipe, tp: int) -> int:
    """What `write_weights` writes; ValueError when the model does not fit."""
    files.check_fits(config, recipe, tp)
    return sum(files.file_bytes(config, recipe, tp).values())


class Workspace:
    """A TurboMind workspace opened for reading, its ranks merged into canonical tensors.

    Files are mapped, not loaded, or streamed to a device (`stream`). Opening checks that every file is there with its
    right size: ValueError or FileNotFoundError names the file, the bytes expected and the bytes found.
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
            weights=RECIPE_OF.get(self.ini.weight_type, "fp16"),
            kv="kv8" if self.ini.quant_policy == KV_INT8 else "kv16",
            group_size=self.ini.group_size,
            head=self.ini.ingot.head or "fp16",
            kv_granularity=self.ini.ingot.kv_granularity if self.ini.quant_policy == KV_INT8 else "tensor",
            rotate_down=self.ini.ingot.rotate_down,
        )
        try:
            files.check_fits(self.config, self.recipe, self.tp)
        except ValueError as error:
            raise ValueError(f"{self._weights / CONFIG_INI}: {error}") from error
        for name, size in files.each_file(self.config, self.recipe, self.tp):
            _check_size(self._weights / name, size)
        self._last: tuple[tuple[int, Part, int | None], dict[str, Tensor]] | None = None
        self._stream: FileStream | None = None

    @contextmanager
    def stream(self, device: torch.device, *, rank: int = 0, tp: int = 1) -> Iterator[dict[str, str]]:
        """Tensors asked for meanwhile lie on the device, where they are also joined and turned. Files are read ahead in
        the order in which a model is loaded, or the share of a `rank` of `tp`. Gives a mapping that has, afterwards,
        the SHA-256 of what was read, by path within the folder."""
        order = files.load_order(self.config, self.recipe, self.tp, rank=rank if tp == self.tp else None)
        digests: dict[str, str] = {}
        self._stream = FileStream(self._weights, order, device)
        try:
            yield digests
        finally:
            read = self._stream.close()
            self._stream = self._last = None
            digests |= {str(WEIGHTS / name): digest for name, digest in read.items()}

    def names(self) -> list[str]:
        """The canonical names of all tensors, in the order in which reading them touches every file once."""
        within = [name for name, _ in files.norm_files(self.config).values()]
        for part in files.parts_of(self.recipe):
            kinds = files.kinds_of(self.config, self.recipe, part)
            if self.recipe.weights == "w4a16":
                kinds = (*names.QUANTIZED, *kinds[2:])
            within += [f"{module}.{kind}" for module in part.modules for kind in kinds]
        layers = range(self.config.num_layers)
        outer = [name for name in files.OUTER_FILES.values() if name != names.HEAD or self.recipe.head == "fp16"]
        outer += head_files.head_tensors(self.config, self.recipe)
        return [*outer, *(names.layer_name(layer, name) for layer in layers for name in within)]

    def tensor(self, name: str) -> Tensor:
        """The whole tensor of a canonical name, Q and K in half-split rotary order, int4 in the HF-AWQ layout."""
        layer, within = names.split_name(name)
        hidden = self.config.hidden_size
        if name in head_files.head_tensors(self.config, self.recipe):
            return self._head(name)
        for file, canonical in files.OUTER_FILES.items():
            if name == canonical:
                whole = self._map(file)
                return whole if canonical == names.FINAL_NORM else whole.view(-1, hidden)[: self.config.vocab_size]
        for file, (canonical, _) in files.norm_files(self.config).items():
            if layer is not None and within == canonical:
                norm = self._map(files.layer_file(layer, file))
                if file in files.HEAD_NORM_FILES:
                    norm = layout.separate_rotary(norm[None], self.config.head_dim)[0]
                return norm
        part = self._part_of(within)
        if layer is not None and part is not None:
            tensors = self._part(layer, part)
            if within in tensors:
                return tensors[within]
        raise ValueError(f"{self.folder} has no tensor {name!r}")

    def weights(self) -> Mapping[str, Tensor]:
        """All tensors by canonical name, read when asked for."""
        return LazyTensors(self.names(), self.tensor)

    def kv_scales(self, *, unused: bool = False) -> KVScales | PerToken | None:
        """How K and V are quantized; None for a kv16 workspace.

        With `unused`, what lies in a workspace whose config.ini does not use it (quant_policy 0), None if nothing does.
        """
        granularity = self.ini.ingot.kv_granularity
        lies = granularity == "token" or any(self._weights.glob("layers.*.past_kv_scale.*"))
        if self.recipe.kv == "kv16" and not (unused and lies):
            return None
        return read_scales(self._weights, self.config, granularity, tp=self.tp)

    def rank_weights(self, rank: int, tp: int) -> Mapping[str, Tensor]:
        """The tensors of one of `tp` ranks, whatever tp the folder was written for, read and cut when asked for.

        ValueError when the model cannot be dealt to so many ranks; `rank_cuts.rank_config` says a rank's shape.
        """
        files.check_fits(self.config, self.recipe, tp)
        cut = RankWeights(self.weights(), self.config, self.recipe, rank=rank, tp=tp)
        if tp != self.tp:
            return cut

        def read(name: str) -> Tensor:
            layer, within = names.split_name(name)
            part = self._part_of(within)
            if layer is None or part is None:
                return cut[name]
            return self._part(layer, part, rank)[within]  # its files are there: nothing is joined to be cut again

        return LazyTensors(cut, read)

    def rank_kv_scales(self, rank: int, tp: int) -> KVScales | PerToken | None:
        """`kv_scales` of the KV heads that one of `tp` ranks keeps."""
        scales = self.kv_scales()
        return rank_scales(scales, rank, tp) if isinstance(scales, KVScales) else scales

    def _map(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        path = self._weights / name
        dtype = dtype or files.float_type(self.config, self.recipe)
        if self._stream is not None:
            return self._stream.take(name, dtype)
        # Private: the pages come from the file, and a write to the tensor could not reach it.
        return torch.from_file(str(path), shared=False, size=path.stat().st_size // dtype.itemsize, dtype=dtype)

    def _head(self, name: str) -> Tensor:
        try:
            return head_files.read_head(name, self.config, self.recipe, self._map)
        except ValueError as error:
            raise ValueError(f"{self._weights / 'output.*'}: {error}") from error

    def _part_of(self, within: str) -> Part | None:
        module = within.rpartition(".")[0]
        return next((part for part in files.parts_of(self.recipe) if module in part.modules), None)

    def _part(self, layer: int, part: Part, rank: int | None = None) -> dict[str, Tensor]:
        """The tensors of a part, of one rank or of all joined."""
        # The last part is kept, because its q, k and v (or codes, zeros and scales) are asked for one after the other.
        key = (layer, part, rank)
        if self._last is None or self._last[0] != key:
            self._last = None
            try:
                self._last = (key, self._read_part(layer, part, rank))
            except ValueError as error:
                raise ValueError(f"{self._weights / files.layer_file(layer, part.stem)}.*: {error}") from error
        return self._last[1]

    def _read_part(self, layer: int, part: Part, own: int | None) -> dict[str, Tensor]:
        def read(kind: str, rank: int) -> Tensor:
            dtype = files.element_type(self.config, self.recipe, kind)
            return self._map(files.rank_file(layer, part, rank if own is None else own, kind), dtype)

        if own is None:
            return join_part(self.config, self.recipe, part, read, tp=self.tp)
        # The files of a rank are those of a model of its shape, with the groups that its cut has.
        shape = rank_config(self.config, self.recipe, self.tp)
        groups = rank_cut(self.config, self.recipe, part.modules, self.tp).group_size
        return join_part(shape, replace(self.recipe, group_size=groups), part, read, tp=1)


def load_workspace(folder: Path, *, device: torch.device | str, dtype: torch.dtype) -> Decoder:
    """The model of a workspace, ready to run; any tp loads, bit-equal."""
    workspace = Workspace(folder)
    return Decoder(workspace.config, workspace.weights(), device=device, dtype=dtype)


def _data(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(torch.uint8).numpy().data.cast("B")


def _check_size(path: Path, expected: int) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; it should be there with {expected} bytes")
    if (found := path.stat().st_size) != expected:
        raise ValueError(f"{path} has {found} bytes where {expected} are expected: it is damaged or of another model")
