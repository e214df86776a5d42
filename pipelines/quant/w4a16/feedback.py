"""Rounding with error feedback (GPTQ, Frantar et al. 2023): what one column loses, the columns after it make up for.

The error of an output is d G d^T for the rounding error d of a row and the Gram matrix G of the inputs. With
H = G + damping and H^-1 = U^T U (U upper triangular), rounding column j and moving all later columns by
-(w_j - q_j) / U_jj * U_j,j+1.. leaves exactly sum_j ((w_j - q_j) / U_jj)^2 of that error.

Scaling the inputs' side of a weight by s turns U into U * s: one factor serves every scale that is tried.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipelines.quant.w4a16.rounding import LEVELS, GroupCodes, levels, searched_levels

DAMPING = 0.01  # part of the mean of G's diagonal that is added to it
MORE_DAMPING = 10.0  # times as much where G is still not positive definite in its precision
ATTEMPTS = 4


def inverse_factor(gram: Tensor) -> Tensor:
    """U upper triangular, float32 [in, in], with U^T U = (gram + damping)^-1.

    Computed in float64 on a CPU. Channels that were never active are damped alone; a gram of zeros counts as the unit
    matrix. ValueError where it stays indefinite.
    """
    # One name for every step on the way: beside the gram there are two matrices at a time.
    wide = torch.float64 if gram.device.type == "cpu" else torch.float32
    mean = gram.to(wide).diagonal().mean()
    damping = DAMPING * mean if float(mean) > 0 else torch.ones_like(mean)
    for _ in range(ATTEMPTS):
        # Reversed, so that the lower factor L gives H = (JLJ)(JLJ)^T with an upper triangular JLJ, U's inverse.
        matrix: Tensor = gram.to(wide).flip(0, 1)
        matrix.diagonal().add_(damping)
        matrix, failed = torch.linalg.cholesky_ex(matrix)
        if not int(failed):
            matrix = matrix.flip(0, 1)
            # Columns are runs of memory, as the solver has them, so the factor takes the unit matrix's place.
            unit = torch.eye(len(gram), dtype=wide, device=gram.device).t()
            matrix = torch.linalg.solve_triangular(matrix, unit, upper=True, out=unit)
            return matrix.float()
        damping = damping * MORE_DAMPING
    raise ValueError("the Gram matrix of a linear's inputs is not positive definite: calibrate on other text")


def feedback(
    weight: Tensor, factor: Tensor, group_size: int, *, symmetric: bool = False, clip: bool = False
) -> tuple[GroupCodes, float]:
    """Codes of `weight` float32 [out, in], and the error d H d^T that they leave, summed over rows.

    `factor` is `inverse_factor` of the inputs, times the scale where the weight was scaled. A group's range is that of
    its columns when their turn comes; with `clip` it is searched, measured by what later columns cannot make up for.
    """
    out, inputs = weight.shape
    rest = weight.t().contiguous()  # a column is a row of memory
    codes = torch.empty(inputs, out, dtype=torch.uint8, device=weight.device)
    grid: list[tuple[Tensor, Tensor]] = []
    error = torch.zeros((), dtype=torch.float64, device=weight.device)
    for first in range(0, inputs, group_size):
        last = first + group_size
        block, corner = rest[first:last], factor[first:last, first:last].contiguous()
        if clip:
            left = torch.cholesky_inverse(corner, upper=True)
            scales, zeros = searched_levels(block.t().contiguous(), left, symmetric=symmetric)
        else:
            scales, zeros = levels(block.t(), symmetric=symmetric)
        codes[first:last], errors = round_block(block, corner, scales, zeros)
        rest[last:].addmm_(factor[first:last, last:].t(), errors, alpha=-1)
        error += errors.double().square().sum()
        grid.append((scales, zeros))
    scales, zeros = (torch.stack(parts, dim=1) for parts in zip(*grid, strict=True))
    return GroupCodes(codes=codes.t().contiguous(), zeros=zeros.byte(), scales=scales), float(error)


def round_block(block: Tensor, corner: Tensor, scales: Tensor, zeros: Tensor) -> tuple[Tensor, Tensor]:
    """Codes uint8 and errors (w - q) / U_jj float32 of one group's columns `block` [group, out], which is used up.

    `corner` [group, group] is the factor's part on the diagonal; `scales` and `zeros` are [out].
    """
    if block.is_cuda:
        from pipelines.quant.w4a16.feedback_kernel import round_block as on_gpu

        found: tuple[Tensor, Tensor] = on_gpu(block, corner, scales, zeros)
        return found
    # Few, large operations: each costs more to start than to compute. A column gets what it is owed in its turn,
    # one product with the errors before it, and a code's bounds take in the zero point.
    diagonal = corner.diagonal().unsqueeze(-1)
    owed = (corner / diagonal).t().contiguous()
    lowest, highest = -zeros, LEVELS - zeros
    steps, errors = torch.empty_like(block), torch.empty_like(block)
    for column, (values, step, left) in enumerate(zip(block, steps, errors, strict=True)):
        if column:
            values.addmv_(errors[:column].t(), owed[column, :column], alpha=-1)
        torch.div(values, scales, out=step).round_()
        torch.clamp(step, lowest, highest, out=step)
        torch.addcmul(values, step, scales, value=-1, out=left)
    return steps.add_(zeros).byte(), errors.div_(diagonal)
