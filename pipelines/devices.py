"""Where a stage may compute: on the CPU, or on a GPU that torch can use."""

from __future__ import annotations


def check_device(device: str) -> None:
    """ValueError where `device` is neither cpu nor a CUDA GPU that is here. Torch is asked only about a GPU."""
    kind, _, number = device.partition(":")
    if device == "cpu":
        return
    if kind != "cuda" or (number and not number.isdecimal()) or device.endswith(":"):
        raise ValueError(f"--device {device} is not known: give cpu, cuda, or cuda:N for one of several GPUs")
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
        raise ValueError(
            f"--device {device}: there is no GPU here that torch can use (torch {torch.__version__} is {build}). Leave "
            "--device out to compute on the CPU, or run this where `torch.cuda.is_available()` is true."
        )
    if number and int(number) >= count:
        there = "is one GPU" if count == 1 else f"are {count} GPUs"
        raise ValueError(f"--device {device}: there {there} here, counted from cuda:0")
