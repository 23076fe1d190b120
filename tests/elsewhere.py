"""Compress, generate, evaluate and train on a pretended device: run by `test_device.py` in a process of its own.

Tensors of the device ``elsewhere`` say so, hold their numbers in memory, and an operation that mixes them with ordinary
ones fails as it does on a GPU: one number alone may be anywhere, and so may indices of a tensor that is elsewhere. The
device is registered with PyTorch for the whole process.
"""

import copy
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

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


def fitted(model: Any, names: list[str]) -> list[Any]:
    """The model compressed by some methods, on random tokens."""
    from mea.compression.api import run_plans
    from mea.compression.calibrate.layerwise import LayerWalk
    from mea.compression.calibrate.text import Calibration
    from mea.compression.options import CompressOptions
    from mea.compression.plan import make_plan

    calibration = Calibration(tokens=1024, window=128)
    tokens = torch.randint(0, 256, (8, 128), generator=torch.Generator().manual_seed(0))
    options = [CompressOptions(keep=0.5, method=name, calibration=calibration) for name in names]
    plans = [make_plan(model.config, 4, one) for one in options]
    return [result.model for result in run_plans(LayerWalk(model), tokens, plans)]


def compress(names: str, folder: str) -> None:
    """Compress a saved model there by methods, and compare what the results say with what they say here."""
    from mea.evaluate.harness.packing import Scored
    from mea.evaluate.harness.scoring import Scorer
    from mea.evaluate.perplexity import token_losses
    from mea.models.loading import load
    from mea.models.quantized_cache import QuantisedCache
    from mea.ops.device import use_device

    tokens = torch.randint(0, 256, (8, 128), generator=torch.Generator().manual_seed(0))
    with Elsewhere():
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        said = {}
        for place in ("cpu", str(DEVICE)):
            use_device(place)
            model, _ = load(folder)
            assert str(model.device) == place
            made = fitted(model, names.split("+"))
            assert {str(x.device) for one in made for x in [*one.parameters(), *one.buffers()]} == {place}
            prompt = tokens[:1, :100].to(place)
            caches = [*((one, None) for one in made), (model, QuantisedCache(model.config, 4))]
            words = [
                one.generate(prompt, max_new_tokens=8, do_sample=False, past_key_values=cache, pad_token_id=0).cpu()
                for one, cache in caches
            ]
            scored = [Scored(tuple(row[:99].tolist()), tuple(row[90:100].tolist())) for row in tokens[:3]]
            scores = sorted(x for results, *_ in Scorer(made[0]).score(scored) for x in results)
            losses = torch.cat([token_losses(one, tokens.flatten(), 128) for one in made])
            said[place] = torch.cat(words), losses, torch.tensor([value for _, value, _ in scores])
    for one, other in zip(*said.values(), strict=True):
        # Attention is another kernel there: where sums differ in the last digit, a code may fall on the other side of
        # an edge, by a step of 1/15 or 1/3 of a range in one component of one token.
        torch.testing.assert_close(one, other.cpu(), rtol=0, atol=0.05)


def train(names: str, folder: str) -> None:
    """Train what `compress` makes there for a few steps, and compare the curves with those made here."""
    from tempfile import TemporaryDirectory

    from mea.compression.methods import METHODS
    from mea.models.loading import load
    from mea.ops.device import use_device
    from mea.train.recovery.api import recover
    from mea.train.recovery.settings import recovery

    tokens = torch.randint(0, 256, (12, 128), generator=torch.Generator().manual_seed(0))
    settings = recovery(
        "distill", trained="attention", precision="float32", tokens=1024, window=128, batch=2, micro_batch=2,
        lr=1e-2, base_lr=1e-2, held_out=512, evaluations=2, checkpoints=1,
    )  # fmt: skip
    with Elsewhere():
        for name in names.split("+"):
            said = []
            for place in ("cpu", str(DEVICE)):
                use_device(place)
                torch.__future__.set_overwrite_module_params_on_conversion(True)
                original, _ = load(folder)
                student = copy.deepcopy(fitted(original, [name])[0])  # they share weights
                torch.__future__.set_overwrite_module_params_on_conversion(False)  # an optimiser keeps parameters
                with TemporaryDirectory() as work:
                    made = recover(student, original, tokens[:8], tokens[8:], settings, Path(work))
                assert {str(x.device) for one in (made.model, original) for x in one.parameters()} == {place}
                said.append([[point["kl"], point["ce"]] for point in made.curve])
            # Codes may fall on the other side of an edge, as above; otherwise sums differ in their last digits.
            tolerance, (one, other) = 1e-3 if METHODS[name].coded else 1e-5, map(torch.tensor, said)
            assert (one[0] - one[-1]).abs().max() > tolerance
            torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


def stream(names: str, folder: str) -> None:
    """Compress a saved model there by methods while the device has room for half of its weights only.

    The run is interrupted before it saves, and continued.
    """
    from tempfile import TemporaryDirectory

    from mea.compression import save
    from mea.compression.calibrate.text import Calibration
    from mea.evaluate.perplexity import token_losses
    from mea.models.loading import MEMORY_SHARE, load
    from mea.ops.device import use_device

    calibration = Calibration(tokens=256, window=64, copy_fraction=0)
    tokens = torch.randint(0, 256, (256,), generator=torch.Generator().manual_seed(0))
    with Elsewhere(), TemporaryDirectory() as made:
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        size = sum(parameter.nbytes for parameter in load(folder)[0].parameters())
        room = int(size / 2 / MEMORY_SHARE)
        for name in names.split("+"):
            said = []
            for place in ("cpu", str(DEVICE)):
                use_device(place)
                torch.accelerator.get_memory_info = lambda device=None: (room, room)
                model, _ = load(folder)
                out = Path(made, f"{name}-{place[:3]}")
                options = {"method": name, "keep": 0.5, "calibration": calibration, "measure_tokens": 0}
                if place != "cpu":
                    assert {x.device.type for x in model.parameters()} == {"elsewhere", "meta"}
                    with patch.object(save, "save_folder", side_effect=KeyboardInterrupt), suppress(KeyboardInterrupt):
                        save.compress_to_folder(folder, out, **options)
                    assert not out.exists()
                save.compress_to_folder(folder, out, **options)
                torch.accelerator.get_memory_info = lambda device=None: (2**30, 2**30)
                said.append([token_losses(one, tokens, 128).cpu() for one in (model, load(str(out))[0])])
            torch.testing.assert_close(*said, rtol=0, atol=0.05)  # see `compress`


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
