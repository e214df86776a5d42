"""The inline assembly of kernels in Gluon, read line by line over torch tensors: see gluon_on_cpu."""

import re
import types

import numpy as np
import torch


class Values(torch.Tensor):
    """A tensor with the methods that a kernel's tensors have."""

    def to(self, dtype, bitcast=False):
        return self.contiguous().view(dtype) if bitcast else torch.Tensor.to(self, dtype)

    def split(self):
        return self[..., 0], self[..., 1]


def values(tensor):
    return torch.as_tensor(tensor).as_subclass(Values)


def float_assembly(asm, *operands):
    """Instructions with single float32 numbers, read line by line."""
    registers = {f"${number}": operand.float() for number, operand in enumerate(operands, 1)}
    for line in asm.strip("{} \n").split(";"):
        if not line.strip() or ".reg" in line:
            continue
        op, arguments = line.split(None, 1)
        target, *names = (part.strip() for part in arguments.split(","))
        given = [
            values(np.uint32(int(name[2:], 16)).view(np.float32)) if name.startswith("0f") else registers[name]
            for name in names
        ]
        steps = {"mul": torch.mul, "add": torch.add, "ex2": torch.exp2, "lg2": torch.log2, "rcp": torch.reciprocal}
        registers[target] = steps[op.split(".")[0]](*given)
    return values(registers["$0"])


def exchange(pairs, lanes, dtype):
    """Pairs [.., 8, 4, 2] as two of `dtype`: those of the lanes that are named, lane 4 r + c having pair [.., r, c]."""
    flat = pairs.reshape(-1, 32, 2).to(dtype[0])
    lanes = lanes.reshape(-1, 32, 2)
    found = [torch.stack([one[lane[:, i]] for one, lane in zip(flat, lanes, strict=True)]) for i in range(2)]
    return tuple(values(each.reshape(pairs.shape)) for each in found)


def permuted(first, second, selector):
    """prmt.b32: four of the eight bytes of two words."""
    given = [(word >> np.uint32(8 * i)) & np.uint32(255) for word in (first, second) for i in range(4)]
    return sum(given[selector >> 4 * i & 7] << np.uint32(8 * i) for i in range(4))


def inline_asm_elementwise(asm, constraints, operands, dtype, is_pure, pack):
    """The few instructions of `int4_fragments`, on pairs of 16-bit elements along the last dimension; what only orders
    loads is nothing."""
    asm = getattr(asm, "value", asm)
    if asm.startswith("bar.warp.sync"):
        return operands[0]
    if asm.startswith("dp4a"):
        words, codes, sums = (operand.contiguous().as_subclass(torch.Tensor) for operand in operands)
        bytes_of = [each.view(torch.int8).view(*each.shape, 4).int() for each in (words, codes)]
        return values((bytes_of[0] * bytes_of[1]).sum(-1).int() + sums)
    if asm.startswith("mov.b32 {$0, $1}"):
        halves = operands[0].int().contiguous().as_subclass(torch.Tensor).view(torch.int16)
        return tuple(values(half) for half in halves.view(*operands[0].shape, 2).unbind(-1))
    if "movmatrix" in asm:
        return values(operands[0].to(dtype).reshape(-1, 8, 8).transpose(1, 2).reshape(operands[0].shape))
    if "shfl.sync.idx" in asm:
        return exchange(*operands, dtype)
    if pack == 1:
        return float_assembly(asm, *operands)
    assert pack == 2
    shape = torch.broadcast_shapes(*(operand.shape for operand in operands))
    results = len(dtype)
    registers = {}
    for number, operand in enumerate(operands):
        bits = operand.expand(shape).contiguous().as_subclass(torch.Tensor).view(torch.int16)
        registers[f"${results + number}"] = bits.numpy().view(np.uint32)
    floats = types.SimpleNamespace(f16x2=torch.float16, bf16x2=torch.bfloat16)

    def read(name):
        return registers[name] if name in registers else np.uint32(int(name, 0))

    def floating(kind, register):
        bits = torch.from_numpy(np.broadcast_to(register, (*shape[:-1], shape[-1] // 2)).copy())
        return bits.view(torch.int16).view(getattr(floats, kind)).float()

    for line in asm.strip("{} \n").split(";"):
        if not line.strip() or ".reg" in line:
            continue
        op, arguments = line.split(None, 1)
        target, *sources = (part.strip() for part in arguments.split(","))
        if op == "mov.b32":
            registers[target] = read(sources[0])
        elif op == "shr.u32":
            registers[target] = read(sources[0]) >> np.uint32(sources[1])
        elif op == "prmt.b32":
            registers[target] = permuted(read(sources[0]), read(sources[1]), int(sources[2], 16))
        elif op == "lop3.b32":
            assert sources[3] == "0xea"  # a & b | c
            registers[target] = read(sources[0]) & read(sources[1]) | read(sources[2])
        else:
            name, kind = re.fullmatch(r"(add|sub|mul|fma)\.rn\.(b?f16x2)", op).groups()
            a, b, *c = (floating(kind, read(source)) for source in sources)
            value = {"add": a + b, "sub": a - b, "mul": a * b}[name] if name != "fma" else a * b + c[0]
            registers[target] = value.to(getattr(floats, kind)).view(torch.int16).numpy().view(np.uint32)
    return tuple(
        values(torch.from_numpy(registers[f"${i}"].copy()).view(torch.int16).view(dtype[i]).reshape(shape))
        for i in range(results)
    )
