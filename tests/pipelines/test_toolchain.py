import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines import toolchain
from pipelines.toolchain import check_toolchain, device_class

ROOT = Path(__file__).resolve().parents[2]
CPUINFO = "processor\t: 0\nvendor_id\t: {vendor}\nflags\t\t: fpu sse {flags}\n\n"


@pytest.mark.parametrize(
    ("vendor", "flags", "expected"),
    [
        ("GenuineIntel", "avx2 fma", "cpu-avx2"),
        ("GenuineIntel", "avx2 fma avx512f", "cpu-avx2"),
        ("GenuineIntel", "avx2", "cpu-generic"),
        ("AuthenticAMD", "avx2 fma", "cpu-avx2-amd"),
        ("CentaurHauls", "", "cpu-generic-centaurhauls"),
    ],
)
def test_the_class_of_a_processor(vendor, flags, expected):
    assert device_class(CPUINFO.format(vendor=vendor, flags=flags)) == expected


def test_versions_are_found_without_importing():
    code = "import sys; from pipelines.toolchain import toolchain; print(toolchain()['torch'], 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    import torch

    assert done.stdout.split() == [torch.__version__, "False"]


def test_the_instruction_set_is_fixed_even_after_torch_was_imported():
    code = "import torch; from pipelines.toolchain import fix_instruction_set as f; f('cpu-generic')\n"
    code += "print(torch.backends.cpu.get_cpu_capability())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() in ("DEFAULT", "NO AVX")


def test_an_unknown_class_fixes_nothing(monkeypatch):
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    monkeypatch.setenv("INGOT_C_KERNELS", "")
    toolchain.fix_instruction_set("cpu-arm64")
    assert "ATEN_CPU_CAPABILITY" not in os.environ
    assert os.environ["INGOT_C_KERNELS"] == "exact"  # no class says whether there is a compiler


def test_a_difference_is_named(monkeypatch):
    here = {"torch": "2.0", "triton": None, "device": "cpu-avx2"}
    monkeypatch.setattr(toolchain, "toolchain", lambda: here)
    check_toolchain(here)
    with pytest.raises(ValueError, match=r"torch 1\.0 \(here: 2\.0\), triton 3 \(here: None\)"):
        check_toolchain({**here, "torch": "1.0", "triton": "3"})
