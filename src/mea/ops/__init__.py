"""Tensors in, tensors out: no modules, no Hugging Face. Start at ``reference.py``."""

import os


def kernels_wanted() -> bool:
    """Whether kernels of our own may be used: not where ``MEA_KERNELS=reference`` asks for PyTorch.

    Raises
    ------
    ValueError
        ``MEA_KERNELS`` has another value than ``auto`` or ``reference``.
    """
    choice = os.environ.get("MEA_KERNELS") or "auto"
    if choice not in ("auto", "reference"):
        raise ValueError(f"MEA_KERNELS is auto (the default) or reference, not {choice!r}")
    return choice == "auto"
