"""The trained parameters (factors, attention, all, or factors and low-rank updates), and each tensor's size."""

from typing import Any

from torch import Tensor, nn

from mea.models.latent_attention import CODED_ATTENTION, LATENT_ATTENTION
from mea.train.recovery.settings import Recovery

LATENT_CLASSES, CODED_CLASSES = tuple(LATENT_ATTENTION.values()), tuple(CODED_ATTENTION.values())
MEANS = ("key_mean", "value_mean")  # of a packed cache: what encoders are given is measured from them
SMALLEST_SIZE = 1e-3  # Adafactor's: tensors that start at zero must also be trained


def choose(student: Any, settings: Recovery) -> Any:
    """Mark the trained parameters and freeze the rest; returns the model to train, with adapters for LoRA.

    Raises
    ------
    ImportError
        LoRA without PEFT.
    """
    student.requires_grad_(settings.trained == "all")
    if settings.trained == "attention":
        for layer in student.model.layers:
            layer.self_attn.requires_grad_(True)
    if settings.trained == "lora":
        student = _with_adapters(student, settings.rank)
    for parameter in factors(student).values():
        parameter.requires_grad_(True)
    for module in student.modules():
        if isinstance(module, CODED_CLASSES):
            for name in MEANS:
                getattr(module.code, name).requires_grad_(False)
    return student


def factors(student: Any) -> dict[str, nn.Parameter]:
    """The encoders and decoders of a compressed model's latents or components, by name."""
    parameters = {}
    for name, module in student.named_modules():
        if isinstance(module, LATENT_CLASSES):
            for part in ("head_mixing", "v_proj"):
                parameters |= {f"{name}.{part}.{key}": p for key, p in getattr(module, part).named_parameters()}
        elif isinstance(module, CODED_CLASSES):
            parameters |= {f"{name}.code.{key}": p for key, p in module.code.named_parameters() if key not in MEANS}
    return parameters


def merged(student: Any) -> Any:
    """The model without adapters: low-rank updates are added to the weights they belong to."""
    from transformers.utils import is_peft_available

    if is_peft_available():
        from peft import PeftModel

        if isinstance(student, PeftModel):
            return student.merge_and_unload()
    return student


def sizes(trained: Any) -> dict[nn.Parameter, float]:
    """The scale of relative learning rates: each tensor's RMS, at least 1e-3 (arXiv 1804.04235).

    The second matrix of a low-rank update is zero at first. Its size is that at which the update would be as large as
    the weight that it is added to, so that a step changes the weight by about the same share as elsewhere.
    """
    size = {p: max(_rms(p), SMALLEST_SIZE) for p in trained.parameters() if p.requires_grad}
    for module in trained.modules():
        for name, second in getattr(module, "lora_B", {}).items():
            first = module.lora_A[name].weight
            of_unit = module.scaling[name] * first.shape[0] ** 0.5 * _rms(first)
            size[second.weight] = _rms(module.base_layer.weight) / of_unit
    return size


def _rms(parameter: Tensor) -> float:
    mean = parameter.detach().float().square().mean()
    return getattr(mean, "full_tensor", lambda: mean)().sqrt().item()  # a sharded tensor's mean is a part's


def _with_adapters(student: Any, rank: int) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ImportError("LoRA needs PEFT: pip install 'mea[lora]', or train factors, attention or all") from None
    own = factors(student)
    output = student.get_output_embeddings()
    targets = [
        name
        for name, module in student.named_modules()
        if isinstance(module, nn.Linear) and module is not output and f"{name}.weight" not in own
    ]
    return get_peft_model(student, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))
