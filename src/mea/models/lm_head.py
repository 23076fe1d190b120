"""Logits of a language model a few rows at a time, and the divergence of two models' predictions from them.

The logits of a whole batch take more memory than a small model: those of 2,048 tokens over a vocabulary of 49,152 are
400 MB in fp32, and several times that with their gradients. `head_logits` computes some rows with the model's own
forward pass; `distance` computes them from the head's weights, together with their gradient.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

ROWS = 256  # rows of logits at a time: with fewer, reading the matrix of the vocabulary for each takes longer
IGNORED = -100  # the label of a token that is not scored


class InseparableHeadError(TypeError):
    """A model's logits cannot be computed from its last hidden states alone."""


def last_hidden_states(model: Any, ids: Int[Tensor, "b t"], **options: Any) -> Float[Tensor, "b t D"]:
    """The input of the model's head: the last layer's output after the final norm.

    Raises
    ------
    InseparableHeadError
        The model has no body that returns last hidden states.
    """
    body = model.base_model
    output = None if body is model else body(input_ids=ids, use_cache=False, **options)
    states = getattr(output, "last_hidden_state", None)
    if states is None:
        raise InseparableHeadError(f"{type(model).__name__} returns no last hidden states")
    return states


def head_logits(model: Any, states: Float[Tensor, "n D"]) -> Float[Tensor, "n vocabulary"]:
    """The model's logits of some last hidden states, including all operations after the head.

    Granite divides its logits and Gemma 2 caps them, so the model's own forward pass runs on `states`.
    Give at most `ROWS` of them to limit memory.

    Raises
    ------
    InseparableHeadError
        The model calls parts of its body one by one, or reads more of its output than the last hidden states.
    """
    ids = torch.zeros(1, len(states), dtype=torch.long, device=states.device)
    with _replaced_forward(model.base_model, _BodyOutput(states[None])) as calls:
        try:
            logits = model(input_ids=ids, use_cache=False).logits[0]
        except (TypeError, AttributeError, KeyError, IndexError) as error:  # other errors will be raised again
            raise InseparableHeadError(f"{type(model).__name__} reads more than the last hidden states") from error
    if calls != [1]:
        raise InseparableHeadError(f"{type(model).__name__} calls parts of its body one by one")
    return logits


class _BodyOutput:
    """A body's output of which only the last hidden states exist."""

    def __init__(self, states: Tensor):
        self.last_hidden_state = states

    def __getattr__(self, _: str) -> None:
        return None

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]


@contextmanager
def _replaced_forward(body: Any, output: Any) -> Iterator[list[int]]:
    """Let the body answer `output` instead of computing; yields how often it was called."""
    calls = [0]

    def forward(*_: Any, **__: Any) -> Any:
        calls[0] += 1
        return output

    own = body.__dict__.get("forward")  # accelerate may have put one there
    body.forward = forward
    try:
        yield calls
    finally:
        if own is None:
            del body.forward
        else:
            body.forward = own


class LMHead:
    """A model's map from last hidden states to logits: ``scale * hidden @ weight.T``.

    Parameters
    ----------
    model
        The language model.
    output
        Its output projection, if the model's own is not in memory.
    frozen
        The projection gets no gradient.

    Raises
    ------
    ValueError
        The model's logits have a bias or a cap.
    """

    def __init__(self, model: Any, output: Any = None, *, frozen: bool = False):
        self._frozen = frozen
        config, self._output = model.config.get_text_config(), output or model.get_output_embeddings()
        if getattr(self._output, "bias", None) is not None or getattr(config, "final_logit_softcapping", None):
            raise ValueError(f"cannot take the divergence of a {config.model_type} whose logits have a bias or a cap")
        self.scale = 1.0 / (getattr(config, "logits_scaling", None) or 1.0)

    @property
    def weight(self) -> Tensor:
        """Read at every step: a sharded model holds the whole weight only during its forward pass."""
        return self._output.weight.detach() if self._frozen else self._output.weight


class _Distance(torch.autograd.Function):
    """Sum over rows of ``kl * KL(original || student) + ce * cross-entropy``, with gradients in the same pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, scale: float, teacher: Any, labels: Tensor, mix: Any) -> Any:
        kl, ce = mix
        dtype = _working(hidden)
        matrix = weight.to(dtype)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        sums = hidden.new_zeros(2, dtype=torch.float64)
        with torch.autocast(hidden.device.type, enabled=False):
            for first in range(0, len(hidden), ROWS):
                rows = slice(first, first + ROWS)
                part = hidden[rows].to(dtype)
                logits = (part @ matrix.T).float().mul_(scale)
                log_sum = logits.logsumexp(-1, keepdim=True)
                known = (labels[rows] != IGNORED)[:, None].float()
                wanted = labels[rows].clamp_min(0)[:, None]
                probability = None
                if kl:
                    other = (teacher[0][rows].to(dtype) @ teacher[1].T).float().mul_(teacher[2])
                    other.sub_(other.logsumexp(-1, keepdim=True))
                    probability = other.exp()
                    # Terms that cancel are subtracted token by token, before the sum.
                    sums[0] += other.sub_(logits).add_(log_sum).mul_(probability).sum(-1).double().sum()
                if ce:
                    sums[1] += ((log_sum - logits.gather(1, wanted)) * known).sum()
                gradient = logits.sub_(log_sum).exp_()
                if ce or kl != 1:
                    gradient.mul_(kl + ce * known)
                    gradient.scatter_add_(1, wanted, -ce * known)
                if probability is not None:
                    gradient.sub_(probability, alpha=kl)
                gradient.mul_(scale)
                gradient = gradient.to(dtype)
                grad_hidden[rows] = (gradient @ matrix).to(hidden.dtype)
                if grad_weight is not None:
                    grad_weight += (gradient.T @ part).float()
        ctx.gradients = grad_hidden, grad_weight
        return (kl * sums[0] + ce * sums[1]).float(), sums.float()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, weight = ctx.gradients
        del ctx.gradients
        weight = None if weight is None else weight * upstream
        return hidden * upstream, weight, None, None, None, None


def distance(
    hidden: Float[Tensor, "n D"],
    head: LMHead,
    original: tuple[Float[Tensor, "n D_original"], LMHead] | None,
    labels: Int[Tensor, " n"],
    *,
    kl: float = 1.0,
    ce: float = 0.0,
) -> tuple[Float[Tensor, ""], Float[Tensor, " 2"]]:
    """Mean over rows of ``kl * KL(original || student) + ce * cross-entropy``, and the two terms by themselves.

    Parameters
    ----------
    hidden, head
        The student's last hidden states and LM head.
    original
        The uncompressed model's last hidden states and LM head; not needed if ``kl`` is 0.
    labels
        The next tokens, or `IGNORED`. Only the cross-entropy needs them.

    Notes
    -----
    Computed in autocast's dtype if autocast is on, sums of exponentials in fp32.
    """
    teacher = None
    if kl:
        if original is None:
            raise ValueError("distillation (kl above 0) needs the original model's hidden states")
        states, other = original
        teacher = (states, other.weight.detach().to(_working(hidden)), other.scale)
    total, sums = _Distance.apply(hidden, head.weight, head.scale, teacher, labels, (kl, ce))
    return total / len(hidden), sums.detach() / len(hidden)


def _working(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
