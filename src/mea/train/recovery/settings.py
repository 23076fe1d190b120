"""What a stage of recovery is: validated, frozen, with presets by name."""

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any, Literal, get_args

from mea.ops.precision import named_dtype
from mea.text import check_fraction

Objective = Literal["attention", "logits", "text"]
Trained = Literal["factors", "attention", "all", "lora"]
Precision = Literal["fast", "bfloat16", "float32"]


@dataclass(frozen=True)
class Recovery:
    """One stage of training after compression. Amounts of training are given in tokens.

    Parameters
    ----------
    objective
        ``"attention"``: every compressed attention's output, given the original's input to it, against the original's
        output, each layer by itself. ``"logits"``: the original's next-token distribution. ``"text"``: plain continued
        pretraining, for which no original is needed.
    trained
        ``"factors"``: encoders and decoders of the latents, ``v_proj`` being the encoder of the values;
        ``"attention"``: all weights of all attention layers; ``"all"``: the whole model; ``"lora"``: the factors, and
        low-rank updates of all other linear layers through PEFT, which are merged at the end.
    tokens
        Text that is trained on; none of it twice.
    window
        Tokens that are read in one piece.
    copy_fraction
        Share of the windows in which a part is read a second time, see `mea.text.repeat_spans`.
    batch
        Windows per step, over all processes.
    micro_batch
        Windows at a time in one process; less takes less memory and gives the same steps.
    rate, base_lr
        Peak learning rate of the factors, and of everything else that is trained.
    relative
        Rates are multiplied by each tensor's own RMS at the start, as Adafactor does (arXiv 1804.04235): factors are an
        order of magnitude smaller than projections, and a joint latent's differ by as much from each other. The second
        matrix of a low-rank update, zero at the start, counts as one that makes the update as large as its weight.
    warmup
        Share of the tokens during which the rate rises; it falls to 0 as a cosine afterwards.
    weight_decay, betas, clip
        Of AdamW; the largest norm of the gradient.
    ce
        With ``"logits"``, the weight of the text's cross-entropy beside the divergence, which has weight 1.
    rank
        Of the low-rank updates.
    held_out
        Tokens at the end of each text that are not trained on; they choose the result, see `RecoveryTrainer.best`.
    evaluations
        How often they are scored.
    checkpoints
        How often the state is saved.
    precision
        Of the products; sums, updates and all that is stored are fp32. ``"fast"`` is bfloat16 where
        this machine multiplies it, else float32.
    less_memory
        Keep no activations within layers for the backward pass; costs a second forward pass.
    seed
        Orders the windows.
    """

    objective: str = "logits"
    trained: str = "attention"
    tokens: int = 100_000
    window: int = 512
    copy_fraction: float = 0.0
    batch: int = 4
    micro_batch: int = 4
    rate: float = 1e-3
    base_lr: float = 1e-3
    relative: bool = True
    warmup: float = 0.1
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    ce: float = 0.0
    rank: int = 16
    held_out: int = 8192
    evaluations: int = 8
    checkpoints: int = 8
    precision: str = "fast"
    less_memory: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (("objective", Objective), ("trained", Trained), ("precision", Precision)):
            one_of(name, getattr(self, name), get_args(allowed))
        object.__setattr__(self, "betas", tuple(self.betas))
        object.__setattr__(self, "precision", named_dtype(self.precision))
        for name in ("tokens", "batch", "micro_batch", "rank", "held_out", "evaluations", "checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        check_fraction(self.copy_fraction)
        if self.window < 8:
            raise ValueError(f"a window of {self.window} tokens leaves too little to predict: 8 at least")
        if self.batch % self.micro_batch:
            raise ValueError(f"a batch of {self.batch} windows cannot be cut into parts of {self.micro_batch}")
        if self.tokens < self.step_tokens:
            raise ValueError(f"{self.tokens:,} tokens are less than one step: {self.batch} windows of {self.window}")
        if not (self.rate > 0 and self.base_lr > 0):
            raise ValueError(f"learning rates must be positive, not {self.rate} and {self.base_lr}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is a share of the tokens, 0 to 1, not {self.warmup}")
        if self.objective == "attention" and self.trained in ("all", "lora"):
            raise ValueError(f"attention outputs train factors or attention, not {self.trained!r}")

    @property
    def step_tokens(self) -> int:
        """Tokens of one step."""
        return self.batch * self.window

    @property
    def steps(self) -> int:
        """Whole steps that the tokens are enough for."""
        return self.tokens // self.step_tokens


# Presets: what differs from the defaults. The rate of `layers` is a usual one, not searched for; that of `distil` was
# the best of three tried from `position` in closed form (experiments/recovery). `near` is `distil` at a lower rate, for
# a start near the original, such as a joint latent; both read parts again, as compression does by default. `cpt` is the
# paper's continued pretraining (arXiv 2601.19611, section on KV-cache compression); its warm-up of 1,000 batches of 68M
# tokens is longer than its run of 22B, so that the share here is ours.
PRESETS: dict[str, dict[str, Any]] = {
    "layers": {"objective": "attention", "trained": "factors", "relative": False},
    "distil": {"trained": "all", "copy_fraction": 0.5},
    "near": {"trained": "all", "copy_fraction": 0.5, "rate": 3e-4, "base_lr": 3e-4},
    "cpt": {
        "objective": "text", "trained": "all", "rate": 1.6e-5, "base_lr": 1.6e-5, "relative": False,
        "weight_decay": 0.1,
    },
}  # fmt: skip


def recovery(preset: str = "distil", **changes: Any) -> Recovery:
    """A preset's settings with changes; those that are None are left as they are.

    Raises
    ------
    ValueError
        There is no such preset or setting, or a value is impossible.
    """
    one_of("the stage", preset, tuple(PRESETS))
    names = tuple(field.name for field in dataclasses.fields(Recovery))
    for name in changes:
        one_of("the setting", name, names)
    return Recovery(**{**PRESETS[preset], **{name: value for name, value in changes.items() if value is not None}})


def one_of(what: str, given: Any, allowed: tuple[str, ...]) -> None:
    """Raise ValueError, with a guess at what was meant, if `given` is not allowed."""
    if given not in allowed:
        close = difflib.get_close_matches(str(given), allowed, n=1)
        guess = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"{what} is one of {', '.join(allowed)}, not {given!r}{guess}")
