"""Compress, generate, evaluate and train on a device and on the CPU: run by `test_device.py` in a process of its own.

The device is a GPU, or the one of `pretended_device.py`.
"""

import copy
import sys
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch


def there(device: str) -> AbstractContextManager[Any]:
    """In this context the device exists."""
    if not device.startswith("elsewhere"):
        return nullcontext()
    from pretended_device import Elsewhere

    torch.__future__.set_overwrite_module_params_on_conversion(True)
    return Elsewhere()


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


def compress(device: str, names: str, folder: str) -> None:
    """Compress a saved model there by methods, and compare what the results say with what they say here."""
    from mea.evaluate.harness.packing import Scored
    from mea.evaluate.harness.scoring import Scorer
    from mea.evaluate.perplexity import token_losses
    from mea.models.loading import load
    from mea.models.quantized_cache import QuantisedCache
    from mea.ops.device import use_device

    tokens = torch.randint(0, 256, (8, 128), generator=torch.Generator().manual_seed(0))
    with there(device):
        said = {}
        for place in ("cpu", device):
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


def train(device: str, names: str, folder: str) -> None:
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
    with there(device):
        for name in names.split("+"):
            said = []
            for place in ("cpu", device):
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


def stream(device: str, names: str, folder: str) -> None:
    """Compress a saved model there by methods while the device has room for half of its weights only.

    The run is interrupted before it saves, and continued.
    """
    from tempfile import TemporaryDirectory

    from mea.compression import save
    from mea.compression.calibrate.text import Calibration
    from mea.evaluate.perplexity import token_losses
    from mea.models.loading import MEMORY_SHARE, load
    from mea.ops.device import use_device
    from mea.text import load_text

    tokens = torch.randint(0, 256, (256,), generator=torch.Generator().manual_seed(0))
    with there(device), TemporaryDirectory() as made:
        size = sum(parameter.nbytes for parameter in load(folder)[0].parameters())
        text = Path(made, "calibration.txt")
        text.write_text(load_text("calibration")[:4000], encoding="utf-8")
        calibration = Calibration(str(text), tokens=256, window=64, copy_fraction=0)
        memory = (int(size / 2 / MEMORY_SHARE),) * 2
        for name in names.split("+"):
            said = []
            for place in ("cpu", device):
                use_device(place)
                out = Path(made, f"{name}-{place[:3]}")
                options = {"method": name, "keep": 0.5, "calibration": calibration, "measure_tokens": 0}
                with patch.object(torch.accelerator, "get_memory_info", return_value=memory):
                    model, _ = load(folder)
                    if place != "cpu":
                        assert {x.device.type for x in model.parameters()} == {device.split(":")[0], "meta"}
                        with (
                            patch.object(save, "save_folder", side_effect=KeyboardInterrupt),
                            suppress(KeyboardInterrupt),
                        ):
                            save.compress_to_folder(folder, out, **options)
                        assert not out.exists()
                    save.compress_to_folder(folder, out, **options)
                said.append([token_losses(one, tokens, 128).cpu() for one in (model, load(str(out))[0])])
            torch.testing.assert_close(*said, rtol=0, atol=0.05)  # see `compress`


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
