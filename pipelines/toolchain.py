"""What computes: the versions of the libraries and the device class, found without importing any of them.

A CPU class fixes the instruction set, so that all machines of one class give equal bits: one with AVX-512
computes as an AVX2 one. MKL promises equal bits on Intel processors alone, so others are classes of their own.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

LIBRARIES = ("torch", "transformers", "triton")
INSTRUCTION_SETS = {
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "generic": {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "DEFAULT"},
}


def toolchain() -> dict[str, str | None]:
    """Version of every library that computes (None where it is not installed), and the class of this device."""
    return {**{name: _version(name) for name in LIBRARIES}, "device": device_class()}


def device_class(cpuinfo: str | None = None) -> str:
    """`cpu-avx2`, `cpu-avx2-amd`, `cpu-generic`, `cpu-arm64`: machines of one class give equal bits."""
    machine = platform.machine().lower()
    if machine not in ("x86_64", "amd64") and cpuinfo is None:
        return "cpu-arm64" if machine == "aarch64" else f"cpu-{machine}"
    text = Path("/proc/cpuinfo").read_text(errors="replace") if cpuinfo is None else cpuinfo
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    values = {key.strip(): value.strip() for key, value in fields.items()}
    instructions = "avx2" if {"avx2", "fma"} <= set(values.get("flags", "").split()) else "generic"
    vendor = values.get("vendor_id", "GenuineIntel")
    return f"cpu-{instructions}" + {"GenuineIntel": "", "AuthenticAMD": "-amd"}.get(vendor, f"-{vendor.lower()}")


def fix_instruction_set(device: str) -> None:
    """Make this process compute as its class does, whether a C compiler is there or not (`engine.kernels.cpu_linear`).
    The libraries read these names at their first operation."""
    os.environ["INGOT_C_KERNELS"] = "exact"
    for name, value in INSTRUCTION_SETS.get(device.split("-")[1], {}).items():
        os.environ[name] = value


def check_toolchain(declared: Mapping[str, str | None]) -> None:
    """ValueError naming what differs between the toolchain that a slice was made for and the one that is here."""
    here = toolchain()
    wrong = [f"{name} {value} (here: {here.get(name)})" for name, value in declared.items() if here.get(name) != value]
    if wrong:
        raise ValueError(
            f"The slice was made for {', '.join(wrong)}. Another toolchain gives other bits: make the slices again"
            " here with `dvc repro compose`, or install what the slice names."
        )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
