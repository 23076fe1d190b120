"""The device that models are loaded onto and trained on."""

import os

import torch

_device = torch.device("cpu")


def use_device(name: str) -> None:
    """Load models onto this device from now on, and train there.

    Parameters
    ----------
    name
        ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ...; ``"cuda"`` is the first GPU, or under ``torchrun`` the GPU of the
        process's local rank; ``"auto"`` is the same, or the CPU if there is no GPU.

    Raises
    ------
    ValueError
        There is no such device.
    """
    global _device
    gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    chosen = {"auto": gpu if torch.cuda.is_available() else "cpu", "cuda": gpu}.get(name, name)
    try:
        if chosen == "meta":
            raise RuntimeError("it holds no numbers")
        torch.empty(1, device=chosen)
        if chosen.startswith("cuda"):
            torch.cuda.set_device(chosen)  # kernels are launched there
        _device = torch.device(chosen)
    except (RuntimeError, AssertionError) as error:  # PyTorch without CUDA asserts
        reason = str(error).splitlines()[0]
        raise ValueError(f"no device {name!r} here ({reason}): give auto, cpu, cuda or cuda:NUMBER") from error


def used_device() -> torch.device:
    """The device of `use_device`; the CPU if that was never called."""
    return _device


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device other than the CPU."""
    return torch.accelerator.get_memory_info(device)[0]
