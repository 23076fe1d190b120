"""A pretended device, for `elsewhere.py`.

Tensors of the device ``elsewhere`` say so, hold their numbers in memory, and an operation that mixes them with ordinary
ones fails as it does on a GPU: one number alone may be anywhere, and so may indices of a tensor that is elsewhere. The
device is registered with PyTorch for the whole process.
"""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("elsewhere")
DEVICE = torch.device("elsewhere:0")
torch.elsewhere.get_amp_supported_dtype = lambda: [torch.bfloat16]  # pyright: ignore[reportAttributeAccessIssue]
torch.accelerator.get_memory_info = lambda device=None: (2**30, 2**30)


class There(torch.Tensor):
    """A tensor elsewhere, around one in memory."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor, requires_grad: bool | None = None) -> Any:
        if requires_grad is not None and not isinstance(inner, There):
            return torch.nn.Parameter(inner, requires_grad)  # accelerate: a parameter in the place of one elsewhere
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, device=DEVICE,
            requires_grad=inner.requires_grad if requires_grad is None else requires_grad,
        )  # fmt: skip

    def __init__(self, inner: torch.Tensor, requires_grad: bool | None = None):
        self.inner = here(inner)
        if requires_grad is not None:
            self._is_param = True

    def storage(self) -> Any:  # tells tied weights apart
        return self.inner.storage()

    def __deepcopy__(self, memo: Any) -> Any:
        made = There(self.inner.detach().clone()).requires_grad_(self.requires_grad)
        made.__dict__.update(_is_param=isinstance(self, torch.nn.Parameter))
        return memo.setdefault(id(self), made)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Elsewhere(TorchDispatchMode):
    """Makes tensors that are asked for on the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def here(x: Any) -> Any:
    return x.inner if isinstance(x, There) else x


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the inner tensors if they are all in one place."""
    name, wanted = func.__name__, kwargs.get("device")
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    there = [isinstance(x, There) for x in tensors]
    copies = name.startswith(("copy_", "_to_copy", "_copy_from"))
    indexes = name.startswith(("index.", "index_put", "_index_put"))
    mixed = any(there) and not all(is_there or x.dim() == 0 for x, is_there in zip(tensors, there, strict=True))
    if mixed and not copies and not (indexes and there[0]):
        raise RuntimeError(f"{func} of tensors on two devices: {[(str(x.device), tuple(x.shape)) for x in tensors]}")
    to = there[0] if copies and tensors else any(there)
    if wanted is not None:
        to = torch.device(wanted).type == DEVICE.type
        kwargs = kwargs | {"device": torch.device("cpu")} if to else kwargs
    result = func(*tree_map(here, args), **tree_map(here, kwargs))
    if args and isinstance(args[0], There) and result is args[0].inner:
        return args[0]  # in place
    return tree_map(
        lambda x: There(x) if to and isinstance(x, torch.Tensor) and not isinstance(x, There) else x, result
    )


def copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    here(target).copy_(here(source))
    return target


LIBRARY = torch.library.Library("aten", "IMPL")  # what ``torch.tensor`` calls below all modes
LIBRARY.impl(
    "empty_strided", lambda *args, **kwargs: There(torch.empty_strided(*args, dtype=kwargs["dtype"])), "PrivateUse1"
)
LIBRARY.impl(
    "empty.memory_format", lambda *args, **kwargs: There(torch.empty(*args, dtype=kwargs["dtype"])), "PrivateUse1"
)
LIBRARY.impl("_copy_from", copy_from, "PrivateUse1")
