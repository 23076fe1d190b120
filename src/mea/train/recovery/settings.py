"""Settings of a recovery stage: checked, frozen, with named presets."""

import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, StrictBool, StrictInt
from pydantic.dataclasses import dataclass

from mea.names import did_you_mean
from mea.ops.precision import named_dtype
from mea.text import check_fraction
from mea.train.settings import CONFIG, Count, NotNegative, Positive, build

Trained = Literal["factors", "attention", "all", "lora"]
Precision = Annotated[Literal["fast", "bfloat16", "float32"], AfterValidator(named_dtype)]


@dataclass(frozen=True, config=CONFIG)
class Recovery:
    """One stage of training after compression. Amounts of training are given in tokens.

    Parameters
    ----------
    objective
        ``"logits"``: divergence from the original's next-token distribution. ``"text"``: plain continued pretraining,
        for which no original is needed.
    trained
        ``"factors"``: encoders and decoders of the latents, ``v_proj`` being the encoder of the values, or those of a
        packed cache's components, which are rounded while training;
        ``"attention"``: all weights of all attention layers; ``"all"``: the whole model; ``"lora"``: the factors, and
        low-rank updates of all other linear layers through PEFT, which are merged at the end.
    tokens
        Number of training tokens, each used once.
    window
        Tokens of one window.
    copy_fraction
        Share of the windows that end with copies of some of their own tokens, see `mea.text.repeat_spans`.
    batch
        Windows per step, over all processes.
    micro_batch
        Windows per forward pass in one process; fewer windows need less memory and give the same steps.
    lr, base_lr
        Peak learning rate of the factors, and of everything else that is trained.
    relative
        Learning rates are multiplied by each tensor's own RMS at the start, as Adafactor does (arXiv 1804.04235):
        factors are an order of magnitude smaller than projections, and those of a shared latent differ by as much. The
        second matrix of a low-rank update is zero at the start: it counts as one that makes the update as large as the
        weight it is added to.
    warmup
        Share of the tokens during which the learning rate rises; it falls to 0 as a cosine afterwards.
    weight_decay, betas, clip
        Settings of AdamW; the largest norm of the gradient.
    ce
        With ``"logits"``, the weight of the text's cross-entropy; the divergence has weight 1.
    rank
        Rank of the low-rank updates.
    held_out
        Tokens at the end of each text that are not trained on; they select the result, see `RecoveryTrainer.best`.
    evaluations
        Number of times that the held-out tokens are scored.
    checkpoints
        Number of times that the state is saved.
    precision
        Precision of matrix products; sums, updates and stored weights are fp32. ``"fast"`` is bfloat16 if this machine
        has fast bfloat16 products, else float32.
    less_memory
        Gradient checkpointing of each layer: less memory, and a second forward pass.
    seed
        Orders the windows.
    """

    objective: Literal["logits", "text"] = "logits"
    trained: Trained = "attention"
    tokens: Count = 100_000
    window: Annotated[StrictInt, Field(ge=8)] = 512
    copy_fraction: float = 0.0
    batch: Count = 4
    micro_batch: Count = 4
    lr: Positive = 1e-3
    base_lr: Positive = 1e-3
    relative: StrictBool = True
    warmup: Annotated[float, Field(ge=0, lt=1, strict=True)] = 0.1
    weight_decay: NotNegative = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    clip: NotNegative = 1.0
    ce: float = 0.0
    rank: Count = 16
    held_out: Count = 8192
    evaluations: Count = 8
    checkpoints: Count = 8
    precision: Precision = "fast"
    less_memory: StrictBool = False
    seed: StrictInt = 0

    def __post_init__(self) -> None:
        check_fraction(self.copy_fraction)
        if self.batch % self.micro_batch:
            raise ValueError(f"batch ({self.batch} windows) must be a multiple of micro_batch ({self.micro_batch})")
        if self.tokens < self.step_tokens:
            raise ValueError(f"{self.tokens:,} tokens are less than one step: {self.batch} windows of {self.window}")

    @property
    def step_tokens(self) -> int:
        """Tokens of one step."""
        return self.batch * self.window

    @property
    def steps(self) -> int:
        """Number of whole steps with these tokens."""
        return self.tokens // self.step_tokens


# Stages: what differs from the defaults. The learning rate of `distill`, relative to each tensor, was the best of three
# (experiments/recovery). `cpt` is the paper's continued pretraining (arXiv 2601.19611, section on KV-cache
# compression); its warm-up of 1,000 batches of 68M tokens is longer than its run of 22B, so that the share is ours.
STAGES: dict[str, dict[str, Any]] = {
    "distill": {"trained": "all", "copy_fraction": 0.5},
    "cpt": {
        "objective": "text", "trained": "all", "lr": 1.6e-5, "base_lr": 1.6e-5, "relative": False, "weight_decay": 0.1,
    },
}  # fmt: skip
# Of `distill` for packed caches, which begin near the original: on 16 thousand tokens 1e-4 took the divergence from
# 0.0097 to 0.0093, and 3e-4 raised it (experiments/recovery). Comparisons train shared latents at these rates too.
NEAR_RATES = {"lr": 1e-4, "base_lr": 1e-4}
OLD_STAGES = {
    "distil": "is called distill now",
    "near": "was distill at other learning rates: use --stage distill --lr 3e-4 --base-lr 3e-4",
    "layers": "does not exist any more: use --stage distill --trained factors",
}


def recovery(stage: str = "distill", *, packed: bool = False, **changes: Any) -> Recovery:
    """The settings of a stage, for a `packed` cache or not, with changes; None keeps the default.

    Raises
    ------
    ValueError
        There is no such stage or setting, or a value is impossible.
    """
    if stage in OLD_STAGES:
        raise ValueError(f"the stage {stage!r} {OLD_STAGES[stage]}")
    if stage not in STAGES:
        raise ValueError(f"the stage must be {' or '.join(STAGES)}, not {stage!r}{did_you_mean(stage, STAGES)}")
    if changes.get("batch") and changes.get("micro_batch") is None:
        changes["micro_batch"] = math.gcd(changes["batch"], Recovery.micro_batch)
    rates = NEAR_RATES if packed and stage == "distill" else {}
    return build(
        Recovery, STAGES[stage] | rates | {name: value for name, value in changes.items() if value is not None}
    )
