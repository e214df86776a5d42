"""Gluon kernels run as plain Python over torch tensors: what they compute, without layouts, lanes and registers.

Triton's interpreter does not run Gluon. Here `gl` is a module of a few functions over tensors, shared memory is a
tensor, a copy arrives when it is asked for, and the assembly of `int4_fragments` is read line by line. Barriers count
their phases, so waiting for one that no copy completes is an error. What layouts do to values is the compiler's to
check: every conversion in these kernels is asserted to move nothing.
(Above 300 lines: a stand-in for a whole language.)
"""

import importlib.util
import math
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from tests.engine.kernels.assembly_on_cpu import inline_asm_elementwise, values

KERNELS = Path(__file__).parents[3] / "engine" / "kernels"


class Pointer:
    def __init__(self, tensor, offsets=0):
        self.tensor, self.offsets = tensor.view(-1), values(offsets)
        self.dtype = types.SimpleNamespace(element_ty=tensor.dtype)

    def __add__(self, offsets):
        return Pointer(self.tensor, self.offsets + offsets)


def load(pointer, mask=None, other=None, cache_modifier=None):
    """What a mask leaves out is `other`, or bits that spoil whatever uses them."""
    offsets = pointer.offsets.long()
    mask, offsets = torch.broadcast_tensors(values(True if mask is None else mask), offsets)
    read = pointer.tensor[torch.where(mask, offsets, 0)]
    spoilt = torch.full_like(read, float("nan")) if read.is_floating_point() else torch.full_like(read, -1)
    return values(torch.where(mask, read, spoilt if other is None else torch.full_like(read, other)))


def store(pointer, value, mask=None):
    value = torch.as_tensor(value, dtype=pointer.tensor.dtype)
    offsets, value = torch.broadcast_tensors(pointer.offsets.long(), value)
    if mask is not None:
        mask = torch.broadcast_to(values(mask), offsets.shape)
        offsets, value = offsets[mask], value[mask]
    assert offsets.numel() == torch.unique(offsets).numel(), "two elements are stored to one place"
    pointer.tensor[offsets] = value.as_subclass(torch.Tensor)


def atomic_add(pointer, amount, sem):
    old = pointer.tensor[pointer.offsets.long()].clone()
    pointer.tensor[pointer.offsets.long()] += amount
    return values(old)


class Shared:
    """Shared memory [stages, ...], or a view of it; not a number until something is copied there."""

    def __init__(self, tensor):
        self.tensor, self.dtype = tensor, tensor.dtype

    def load(self, layout):
        return values(self.tensor.clone())

    def store(self, value):
        assert value.shape == self.tensor.shape
        self.tensor.copy_(value)

    def index(self, i):
        return Shared(self.tensor[int(i)])

    def slice(self, start, length, dim):
        return Shared(self.tensor.narrow(dim, start, length))

    def permute(self, order):
        return Shared(self.tensor.permute(order))


def allocate_shared_memory(dtype, shape, layout, value=None):
    if value is not None:
        return Shared(torch.as_tensor(value, dtype=dtype).clone())
    fill = float("nan") if dtype.is_floating_point else 77 if dtype == torch.int8 else 0
    return Shared(torch.full(shape, fill, dtype=dtype))


class Descriptor:
    """A tensor in blocks, zeros outside; what the host makes and the kernel reads."""

    def __init__(self, tensor, block, layout):
        self.tensor, self.block, self.layout, self.dtype = tensor, block, layout, tensor.dtype
        self.block_type = types.SimpleNamespace(nbytes=math.prod(block) * tensor.element_size())

    @staticmethod
    def from_tensor(tensor, block, layout):
        return Descriptor(tensor, block, layout)


def copy(descriptor, place, barrier, shared, pred=True):
    if not pred:
        return
    block = torch.zeros(descriptor.block, dtype=descriptor.dtype)
    read = descriptor.tensor[tuple(slice(int(p), int(p) + size) for p, size in zip(place, block.shape, strict=True))]
    block[tuple(slice(size) for size in read.shape)] = read
    shared.tensor.copy_(block)
    left = int(barrier.tensor[0]) % PHASE - block.numel() * block.element_size()
    assert left >= 0, "a copy of bytes that are not expected"
    barrier.tensor[0] += left - barrier.tensor[0] % PHASE
    if left == 0:
        barrier.tensor[0] += PHASE


PHASE = 1 << 32  # a barrier holds the phases that are completed, and below the bytes that are on their way


def expect(barrier, nbytes, pred=True):
    if not pred:
        return
    assert barrier.tensor[0] % PHASE == 0, "a copy to a place whose last one is not complete"
    barrier.tensor[0] += nbytes


def wait(barrier, phase, pred=True):
    if not pred:
        return
    done = int(barrier.tensor[0])
    assert done % PHASE == 0 and done // PHASE % 2 != int(phase), "this wait would not end"


def multiply(left, right, total, use_acc=True, is_async=False):
    left, right = (side.tensor if isinstance(side, Shared) else side for side in (left, right))
    floats = torch.float32 if left.is_floating_point() else torch.float64  # in float64 sums of int8 products are exact
    product = left.as_subclass(torch.Tensor).to(floats) @ right.as_subclass(torch.Tensor).to(floats)
    return values(total * use_acc + product.to(total.dtype))


class Language(types.ModuleType):
    """`gl`; a layout is nothing."""

    def __init__(self, name):
        super().__init__(name)
        self.warps, self.ids, self.grid = 4, (0, 0, 0), (1, 1, 1)
        self.order = reversed  # of programs: the last first
        self.float16, self.bfloat16, self.float32 = torch.float16, torch.bfloat16, torch.float32
        self.int8, self.int16, self.int32, self.int64 = torch.int8, torch.int16, torch.int32, torch.int64
        self.constexpr, self.static_range = lambda value: value, range
        self.load, self.store, self.atomic_add = load, store, atomic_add
        self.allocate_shared_memory, self.inline_asm_elementwise = allocate_shared_memory, inline_asm_elementwise
        self.run = lambda program, warps: program()

    def __getattr__(self, name):
        if not name.endswith("Layout"):
            raise AttributeError(name)
        layout = lambda *arguments: name  # noqa: E731
        layout.get_default_for = layout
        return layout

    def static_assert(self, condition, message=""):
        assert condition, message

    def arange(self, start, end, layout=None):
        return values(torch.arange(start, end))

    def zeros(self, shape, dtype, layout=None):
        return values(torch.zeros(shape, dtype=dtype))

    def full(self, shape, value, dtype, layout=None):
        return values(torch.full(shape, float(value), dtype=dtype))

    def zeros_like(self, value):
        return values(torch.zeros_like(value))

    def to_tensor(self, value):
        return values(value)

    def cdiv(self, first, second):
        return -(-first // second)

    def exp2(self, value):
        return value.exp2()

    def log2(self, value):
        return value.log2()

    def floor(self, value):
        return value.floor()

    def convert_layout(self, value, layout, assert_trivial=False):
        return value

    def expand_dims(self, value, axis):
        return value.unsqueeze(axis)

    def join(self, first, second):
        return values(torch.stack((first, second), dim=-1))

    def minimum(self, first, second):
        return torch.minimum(values(first), values(second))

    def maximum(self, first, second, propagate_nan=None):
        """torch's has what is not a number win, which the other leaves out."""
        return (torch.fmax if propagate_nan is None else torch.maximum)(values(first), values(second))

    def broadcast(self, first, second):
        return tuple(values(tensor) for tensor in torch.broadcast_tensors(first, second))

    def max(self, value, axis):
        return values(value.amax(axis))

    def abs(self, value):
        return value.abs()

    def div_rn(self, first, second):
        return values(first) / second

    def fma(self, first, second, third):
        """In float64 the product is exact."""
        return values((first.double() * second.double() + third.double()).float())

    def rsqrt(self, value):
        return value.rsqrt()

    def exp(self, value):
        return value.exp()

    def where(self, condition, first, second):
        return torch.where(values(condition), values(first), values(second))

    def sum(self, value, axis):
        return values(value.sum(axis))

    def program_id(self, axis):
        return values(torch.tensor(self.ids[axis]))

    def num_programs(self, axis):
        return self.grid[axis]

    def num_warps(self):
        return self.warps

    def thread_barrier(self):
        pass


class EachWarp(Language):
    """`gl` of kernels whose warps do different things: each is a thread of its own. What a program does once, the first
    warp does for all."""

    def __init__(self, name):
        super().__init__(name)
        self.run, self.atomic_add = self._run, self._atomic_add
        self.allocate_shared_memory, self.inline_asm_elementwise = self._allocate, self._assembly
        self.here = threading.local()

    def _run(self, program, warps):
        self.meeting, self.memory, self.arrival = threading.Barrier(warps), {}, None

        def warp(number):
            self.here.warp, self.here.allocated = number, 0
            try:
                program()
            except BaseException:
                self.meeting.abort()  # or the others would wait for it
                raise

        with ThreadPoolExecutor(warps) as threads:
            ended = [threads.submit(warp, number) for number in reversed(range(warps))]
        failed = [problem for problem in (one.exception() for one in ended) if problem is not None]
        for problem in sorted(failed, key=lambda problem: isinstance(problem, threading.BrokenBarrierError)):
            raise problem

    def thread_barrier(self):
        self.meeting.wait()

    def _allocate(self, dtype, shape, layout):
        self.here.allocated += 1
        return self.memory.setdefault(self.here.allocated, allocate_shared_memory(dtype, shape, layout))

    def _assembly(self, asm, *arguments, **options):
        if "%tid.x" in getattr(asm, "value", asm):
            return values(torch.tensor(self.here.warp))
        return inline_asm_elementwise(asm, *arguments, **options)

    def _atomic_add(self, *arguments, **options):
        self.meeting.wait()
        if self.here.warp == 0:
            self.arrival = atomic_add(*arguments, **options)
        self.meeting.wait()
        return self.arrival


class Kernel:
    """A jitted function: called, it is the function; `[grid]` runs it for every program, in the language's order."""

    def __init__(self, function, language):
        self.function, self.language = function, language

    def __call__(self, *arguments):
        return self.function(*arguments)

    def __getitem__(self, grid):
        def launch(*arguments, num_warps, maxnreg=None, **constants):
            gl = self.language
            gl.warps, gl.grid = num_warps, (*grid, 1, 1)[:3]
            arguments = [Pointer(a) if isinstance(a, torch.Tensor) else a for a in arguments]
            for z in gl.order(range(gl.grid[2])):
                for y in gl.order(range(gl.grid[1])):
                    for x in gl.order(range(gl.grid[0])):
                        gl.ids = (x, y, z)
                        gl.run(lambda: self.function(*arguments, **constants), num_warps)

        return launch


def modules(language):
    """The modules that kernels in Gluon import, by name."""
    gl = language("gl")
    given = {}

    def module(name, **attributes):
        given[name] = types.ModuleType(name)
        given[name].__dict__.update(attributes)
        return given[name]

    def jit(function=None, **options):
        return Kernel(function, gl) if function else lambda function: Kernel(function, gl)

    barrier = types.SimpleNamespace(
        init=lambda barrier, count: None, expect=expect, wait=wait, MBarrierLayout=lambda: "barriers"
    )
    module("triton.experimental.gluon", jit=jit, constexpr_function=lambda function: function, language=gl)
    given["triton.experimental.gluon.language"] = gl
    module("triton.experimental.gluon.language.nvidia")
    module("triton.experimental.gluon.language.nvidia.ampere", mma_v2=multiply)
    module(
        "triton.experimental.gluon.language.nvidia.hopper",
        fence_async_shared=lambda: None,
        mbarrier=barrier,
        tma=types.SimpleNamespace(async_copy_global_to_shared=copy),
        warpgroup_mma=multiply,
        warpgroup_mma_wait=lambda count, deps: deps[0] if len(deps) == 1 else tuple(deps),
    )
    module("triton.experimental.gluon.nvidia")
    module("triton.experimental.gluon.nvidia.hopper", TensorDescriptor=Descriptor)
    return given


def kernels(*names, language=Language):
    """The modules engine.kernels.<name>, of which later ones may import earlier ones, run as plain Python."""
    replaced = modules(language)
    replaced |= {f"engine.kernels.{name}": None for name in names}
    before = {name: sys.modules.get(name) for name in replaced}
    loaded = []
    # A package that was imported hands out its modules as attributes, whatever sys.modules says.
    parents = [(sys.modules.get(name.rpartition(".")[0]), name.rpartition(".")[2], name) for name in replaced]
    given = [(parent, child, getattr(parent, child)) for parent, child, _ in parents if hasattr(parent, child)]
    try:
        for name, module in replaced.items():
            if module is not None:
                sys.modules[name] = module
        for parent, child, name in parents:
            if replaced[name] is not None and hasattr(parent, child):
                setattr(parent, child, replaced[name])
        for name in names:
            spec = importlib.util.spec_from_file_location(f"engine.kernels.{name}", KERNELS / f"{name}.py")
            loaded.append(importlib.util.module_from_spec(spec))
            sys.modules[spec.name] = loaded[-1]
            spec.loader.exec_module(loaded[-1])
    finally:
        for parent, child, module in given:
            setattr(parent, child, module)
        for name, module in before.items():
            if module is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module
    return loaded
