"""The inline assembly of kernels in Gluon, read line by line over torch tensors: see gluon_on_cpu."""

import re
import types

import numpy as np
import torch

INTEGERS = {2: torch.int16, 4: torch.int32}


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
    """The few instructions of `int4_fragments`, a word at a time (pack 1), and of others on pairs of 16-bit elements
    along the last dimension; what only orders loads is nothing."""
    asm = getattr(asm, "value", asm)
    if asm.startswith("bar.warp.sync"):
        return operands[0]
    if asm.startswith("dp4a"):
        words, codes, sums = (operand.contiguous().as_subclass(torch.Tensor) for operand in operands)
        bytes_of = [each.view(torch.int8).view(*each.shape, 4).int() for each in (words, codes)]
        return values((bytes_of[0] * bytes_of[1]).sum(-1).int() + sums)
    if "movmatrix" in asm:
        return values(operands[0].to(dtype).reshape(-1, 8, 8).transpose(1, 2).reshape(operands[0].shape))
    if "shfl.sync.idx" in asm:
        return exchange(*operands, dtype)
    if pack == 1 and not isinstance(dtype, tuple):
        return float_assembly(asm, *operands)
    shape = torch.broadcast_shapes(*(operand.shape for operand in operands))
    results = len(dtype)
    registers = {}
    for number, operand in enumerate(operands):
        bits = operand.expand(shape).contiguous().as_subclass(torch.Tensor).view(INTEGERS[operand.element_size()])
        bits = bits.numpy().view(np.uint32 if pack == 2 or operand.element_size() == 4 else np.uint16)
        registers[f"${results + number}"] = bits.astype(np.uint32)
    (words,) = {register.shape for register in registers.values()}
    floats = types.SimpleNamespace(f16x2=torch.float16, bf16x2=torch.bfloat16)

    def read(name):
        return registers[name] if name in registers else np.uint32(int(name, 0))

    def floating(kind, register):
        bits = torch.from_numpy(np.broadcast_to(register, words).copy())
        return bits.view(torch.int16).view(getattr(floats, kind)).float()

    for line in asm.strip("{} \n").split(";"):
        if not line.strip() or ".reg" in line:
            continue
        op, arguments = line.split(None, 1)
        target, *sources = (part.strip() for part in re.split(r",(?![^{]*})", arguments))
        if op == "mov.b32" and "{" in target:
            low, high = re.findall(r"[$\w]+", target)
            registers[low], registers[high] = read(sources[0]) & np.uint32(0xFFFF), read(sources[0]) >> np.uint32(16)
        elif op == "mov.b32" and "{" in sources[0]:
            low, high = re.findall(r"[$\w]+", sources[0])
            registers[target] = read(low) | read(high) << np.uint32(16)
        elif op == "mov.b32":
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
    bits = (registers[f"${i}"].astype(np.uint32 if pack == 2 else np.uint16) for i in range(results))
    return tuple(
        values(torch.from_numpy(each).view(torch.int16).view(kind).reshape(shape))
        for each, kind in zip(bits, dtype, strict=True)
    )
