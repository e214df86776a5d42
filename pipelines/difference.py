"""Where two artifacts of one recipe differ: in which files, in which tensors, and by how much.

Weights are compared as what they stand for, so that codes and scales of a linear are one tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.kernels import reference as ops
from engine.models import names
from engine.models.cache import KVScales
from engine.models.linear import Int4Linear, Int8Linear, read_linear
from engine.storage import turbomind_files as files
from engine.storage.artifacts import Manifest, read_manifest
from engine.storage.head_files import MODULE as HEAD
from engine.storage.head_files import head_bytes
from engine.storage.workspace import WEIGHTS, Workspace
from pipelines.quant.pairs import ATTENTION_OUT, PAIRS, repeat_heads

EXACT = 1e-3
ROUNDED = {"w4a16": 0.35, "int4": 0.35, "w8a8": 0.03, "int8": 0.03}
"""How far tensors may be apart, in parts of their norm, that another device made of the same: floats and scales, and
linears by recipe, the output matrix by its own type. Error feedback turns one bit of difference into another rounding
altogether, so two results are as far apart as each is from the model: measured 0.16 to 0.23 for 4 bits of the demo,
between two classes of CPU. Weights that have nothing to do with each other are 1.4 apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One tensor that differs: the first file of it that does, the largest error of a value, and the norm of all
    errors in parts of the norm of the tensor. Bytes may differ with no error: codes that stand for the same values."""

    tensor: str
    file: str
    max_error: float
    relative_error: float
    tolerance: float

    @property
    def is_near(self) -> bool:
        """Whether another device may have made it of the same model."""
        return self.relative_error <= self.tolerance


def changed_files(one: Manifest, other: Manifest) -> list[str]:
    """The paths that are not in both manifests with the same bytes, sorted."""
    left, right = ({entry.path: entry.sha256 for entry in manifest.files} for manifest in (one, other))
    return sorted(path for path in left.keys() | right.keys() if left.get(path) != right.get(path))


def tensor_differences(one: Path, other: Path) -> Iterator[Difference]:
    """The tensors of two artifacts whose bits differ, in the order of the model; errors are of `other` against `one`.

    ValueError where they are not of one shape.
    """
    left, right, changed = _opened(one, other)
    parts: dict[str, list[str]] = {}
    for name in left.names():
        parts.setdefault(_stem(left, name), []).append(name)
    for name, stored in parts.items():
        file = _changed_file(left, name, changed)
        if file is None or all(torch.equal(left.tensor(part), right.tensor(part)) for part in stored):
            continue
        yield _difference(name, file, _value(left, name), _value(right, name))
    yield from _kv_differences(left, right, changed, "KV")


def model_differences(one: Path, other: Path) -> Iterator[Difference]:
    """The same, blind to scales that cancel out in the model (`scale_free_layer`); V's scales of int8 KV, which follow
    v's, are left out."""
    left, right, changed = _opened(one, other)
    for name in dict.fromkeys(_stem(left, name) for name in left.names() if names.split_name(name)[0] is None):
        file = _changed_file(left, name, changed)
        if file is not None:
            tolerance = ROUNDED.get(left.recipe.head, EXACT) if name == HEAD else EXACT
            yield _difference(name, file, _value(left, name), _value(right, name), tolerance)
    for layer in range(left.config.num_layers):
        wanted, found = (scale_free_layer(one.config, one.weights(), layer) for one in (left, right))
        for module, tensor in wanted.items():
            if not torch.equal(tensor, found[module]):
                name = names.layer_name(layer, module)
                file = _changed_file(left, name, changed) or f"the norm before {name}"
                yield _difference(name, file, tensor, found[module], ROUNDED.get(left.recipe.weights, EXACT))
    yield from _kv_differences(left, right, changed, "K")


def _opened(one: Path, other: Path) -> tuple[Workspace, Workspace, set[str]]:
    """Both artifacts, and the files that differ."""
    left, right = Workspace(one), Workspace(other)
    if (left.config, left.recipe, left.tp) != (right.config, right.recipe, right.tp):
        raise ValueError(f"{one} and {other} are not of one model, recipe and tp: their tensors cannot be compared")
    return left, right, set(changed_files(read_manifest(one), read_manifest(other)))


def _kv_differences(left: Workspace, right: Workspace, changed: set[str], which: str) -> Iterator[Difference]:
    for layer in range(left.config.num_layers):
        touched = [path for path in sorted(changed) if f"layers.{layer}.past_kv_scale" in path]
        if not touched:
            continue
        for what, wanted, found in zip("KV", _kv_scales(left, layer), _kv_scales(right, layer), strict=False):
            if what in which and not torch.equal(wanted, found):
                yield _difference(f"scales of {what} in layer {layer}", touched[0], wanted, found)


def scale_free_layer(config: ModelConfig, weights: Mapping[str, Tensor], layer: int) -> dict[str, Tensor]:
    """The linears of a layer as what they stand for, float32, with the scales taken out that cancel out in the model.

    The weight of a norm is part of the linears that read it, the rows of v and up have norm 1, and the columns of o and
    down what those rows had.
    """
    found = {module: dense_weight(weights, names.layer_name(layer, module)) for module in names.LINEARS}
    for pair in PAIRS:
        if pair.before in names.NORMS:
            scale = weights[names.layer_name(layer, f"{pair.before}.weight")].float()
        else:
            norm = found[pair.before].norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
            found[pair.before] = found[pair.before] / norm.unsqueeze(-1)
            scale = repeat_heads(norm, config) if pair is ATTENTION_OUT else norm
        found |= {module: found[module] * scale for module in pair.after}
    return found


def dense_weight(weights: Mapping[str, Tensor], name: str) -> Tensor:
    """What a linear multiplies with, float32 [out, in], however it is stored."""
    linear = read_linear(weights, name, device="cpu", dtype=torch.float32)
    if isinstance(linear, Int4Linear):
        return ops.unpack_int4(linear.qweight, linear.qzeros, linear.scales).float()
    if isinstance(linear, Int8Linear):
        return linear.weight.float() * linear.scales.unsqueeze(-1)
    return linear.weight


def _difference(name: str, file: str, wanted: Tensor, found: Tensor, tolerance: float = EXACT) -> Difference:
    error = (found - wanted).double()
    norm = float(wanted.double().norm())
    return Difference(
        tensor=name,
        file=file,
        max_error=float(error.abs().max()),
        relative_error=float(error.norm()) / norm if norm else float(error.norm() > 0),
        tolerance=tolerance,
    )


def _stem(workspace: Workspace, name: str) -> str:
    """A linear's name for its weight, whatever it is stored in; other tensors' own."""
    layer, within = names.split_name(name)
    module, _, part = within.rpartition(".")
    if layer is None and workspace.recipe.head != "fp16" and name.startswith(f"{HEAD}."):
        return HEAD
    return name.removesuffix(f".{part}") if layer is not None and module in names.LINEARS and part != "bias" else name


def _changed_file(workspace: Workspace, name: str, changed: set[str]) -> str | None:
    """The first file of a tensor that differs."""
    return next((path for path in _files_of(workspace, name) if path in changed), None)


def _files_of(workspace: Workspace, name: str) -> Iterator[str]:
    """The files that a tensor is in, by their paths in the artifact."""
    layer, within = names.split_name(name)
    config, recipe = workspace.config, workspace.recipe
    found = [file for file, canonical in files.OUTER_FILES.items() if canonical == name]
    if name == HEAD:
        found += head_bytes(config, recipe, workspace.tp)
    if layer is not None:
        norms = files.norm_files(config).items()
        found += [files.layer_file(layer, file) for file, (canonical, _) in norms if canonical == within]
        for part in files.parts_of(recipe):
            if within.removesuffix(".bias") in part.modules:
                kinds = [k for k in files.kinds_of(config, recipe, part) if (k == "bias") == within.endswith(".bias")]
                found += [files.rank_file(layer, part, rank, kind) for rank in range(workspace.tp) for kind in kinds]
    yield from ((WEIGHTS / file).as_posix() for file in found)


def _value(workspace: Workspace, name: str) -> Tensor:
    """A tensor as what it stands for, float32."""
    if name == HEAD or names.split_name(name)[1] in names.LINEARS:
        return dense_weight(workspace.weights(), name)
    return workspace.tensor(name).float()


def _kv_scales(workspace: Workspace, layer: int) -> tuple[Tensor, ...]:
    """Scales and zero points of K, and those of V; none where they are not kept."""
    scales = workspace.kv_scales(unused=True)
    return (scales.key[layer], scales.value[layer]) if isinstance(scales, KVScales) else ()
