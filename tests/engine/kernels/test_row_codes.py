"""The division by one reciprocal a row, of `rounding.row_codes`, against a division of every number.

Why this proves it: the corrected quotient is within 2^-22 of a unit in its last place of x / scale before its own
rounding, so it can be another number than the division's only for the x next to a place half way between two floats;
and codes can only differ by it beside k + 1/2. Powers of two in x and scale change nothing.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from engine.kernels import c_library


def differing(folder, step):
    """Codes that differ, codes tried, and codes that would differ without the correction, of every step-th scale."""
    compiler = next(filter(None, map(shutil.which, c_library.COMPILERS)), None)
    if compiler is None:
        pytest.skip("there is no C compiler")
    flags = c_library.instruction_flags(c_library.processor_flags(), "AVX2")
    source, library = Path(__file__).with_name("row_codes.c"), folder / "row_codes.so"
    subprocess.run([compiler, *c_library.FLAGS, *flags, "-o", library, source, "-lm"], check=True)
    count = ctypes.CDLL(str(library)).differing_codes
    count.restype = ctypes.c_long
    tried, plain = ctypes.c_long(), ctypes.c_long()
    different = count(ctypes.c_long(step), ctypes.byref(tried), ctypes.byref(plain))
    return different, tried.value, plain.value


def test_codes_are_those_of_a_division(tmp_path):
    different, tried, plain = differing(tmp_path, 997)
    assert tried > 6_000_000 and plain > 10_000  # the correction is needed
    assert different == 0


@pytest.mark.soak
def test_codes_are_those_of_a_division_for_every_scale(tmp_path, soak_row):
    soak_row["failures"], soak_row["count"], _ = differing(tmp_path, 1)
    assert soak_row["count"] == (1 << 23) * 256 * 3 and not soak_row["failures"]
