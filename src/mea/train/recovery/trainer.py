"""The Trainer of recovery: two learning rates, and the best state on held-out text.

A checkpoint holds only the trained parameters and the optimiser's state, gathered from all shards.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxtyping import Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import TrainerCallback

from mea.records import Progress
from mea.train.fsdp import full_state, is_sharded, load_full_state
from mea.train.recovery.parameters import sizes
from mea.train.recovery.settings import Recovery
from mea.train.trainer import BaseTrainer, ReportSteps, readable, training_arguments

Point = dict[str, float | int]
WEIGHTS, BEST = "trained.safetensors", "best.safetensors"


class DivergedError(ValueError):
    """The loss is NaN or infinite."""


class Windows(Dataset):
    """Rows of tokens in a fixed order."""

    def __init__(self, rows: Int[Tensor, "n t"]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index]}


class EvaluateAtEnd(TrainerCallback):
    """Evaluates at the end too, at any interval."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_evaluate = True


class RecoveryTrainer(BaseTrainer):
    """Trains a `Distilled` module, sharded or not.

    Parameters
    ----------
    module
        Maps token ids to ``loss``, and while evaluating also to ``ce`` and, with an original, ``kl``.
    factors
        The parameters that train at ``settings.lr``.
    score
        Returns the current held-out losses of the module: ``{"ce": ..., "kl": ...}``.
    folder
        For checkpoints and the best state.
    """

    def __init__(
        self,
        module: nn.Module,
        factors: list[nn.Parameter],
        rows: Int[Tensor, "n t"],
        score: Callable[[], dict[str, float]],
        settings: Recovery,
        folder: Path,
        progress: Progress | None = None,
    ):
        self.settings, self.folder, self.score = settings, folder, score
        self._factors = {id(parameter) for parameter in factors}
        steps = settings.steps
        args = training_arguments(
            folder,
            next(module.parameters()).device,
            steps=steps,
            rows=settings.batch,
            micro_rows=settings.micro_batch,
            learning_rate=settings.base_lr,
            lr_scheduler_type="cosine",
            warmup_steps=round(settings.warmup * steps),
            weight_decay=settings.weight_decay,
            adam_beta1=settings.betas[0],
            adam_beta2=settings.betas[1],
            max_grad_norm=settings.clip,
            bf16=settings.precision == "bfloat16",
            eval_steps=max(1, round(steps / settings.evaluations)),
            eval_on_start=True,
            save_steps=max(1, round(steps / settings.checkpoints)),
            logging_steps=max(1, steps // 500),
            report_to="none",
            ddp_find_unused_parameters=False,
            seed=settings.seed,
        )
        reports = [ReportSteps(progress, "recovering", settings.step_tokens)] if progress else []
        super().__init__(
            module,
            args,
            sharded=is_sharded(module),
            train_dataset=Windows(rows),
            eval_dataset=Windows(rows[:1]),
            callbacks=[EvaluateAtEnd(), *reports],
        )

    @property
    def curve(self) -> list[Point]:
        """Held-out losses so far, beginning with the start: ``tokens``, ``ce`` and, with an original, ``kl``."""
        evaluations = [entry for entry in self.state.log_history if "held_out_ce" in entry]
        keys = ("tokens", "held_out_ce", "held_out_kl")
        return [{key.removeprefix("held_out_"): entry[key] for key in keys if key in entry} for entry in evaluations]

    @property
    def best(self) -> Point:
        """The point with the lowest divergence, of the points with no higher loss on the text than the start.

        Without an original, or with the text as objective, the point with the lowest loss.
        """
        points = [point for point in self.curve if point["ce"] <= self.curve[0]["ce"]]
        criterion = "kl" if self.settings.objective != "text" and "kl" in points[0] else "ce"
        return min(points, key=lambda point: point[criterion])

    @property
    def losses(self) -> list[Point]:
        """Training losses: ``tokens`` and the mean ``loss`` of the steps since the entry before."""
        return [
            {"tokens": entry["step"] * self.settings.step_tokens, "loss": entry["loss"]}
            for entry in self.state.log_history
            if "loss" in entry
        ]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """One group for the factors and one for the rest; with relative learning rates one for every tensor."""
        settings = self.settings
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        factors = [parameter for parameter in trained if id(parameter) in self._factors]
        rest = [parameter for parameter in trained if id(parameter) not in self._factors]
        groups = [{"params": factors, "lr": settings.lr}, {"params": rest, "lr": settings.base_lr}]
        if settings.relative:
            size = sizes(self.model)
            groups = [
                {"params": [parameter], "lr": group["lr"] * size[parameter]}
                for group in groups
                for parameter in group["params"]
            ]
        return [group for group in groups if group["params"]]

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The module's loss.

        Raises
        ------
        DivergedError
            It is not finite.
        """
        outputs = model(**inputs)
        if not outputs["loss"].isfinite():
            raise DivergedError(
                f"the loss is {outputs['loss'].item()} at step {self.state.global_step + 1} with learning rates "
                f"{self.settings.lr:g} and {self.settings.base_lr:g}: train with lower ones (--lr, --base-lr)"
            )
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Score the held-out text, and save the state if it is the best."""
        tokens = self.state.global_step * self.settings.step_tokens
        if any(point["tokens"] == tokens for point in self.curve):  # scored before an interruption
            return {}
        self.model.eval()
        scores = self.score()
        self.model.train()
        if not math.isfinite(scores["ce"]):
            raise DivergedError(
                f"the held-out loss is {scores['ce']} after {tokens:,} tokens: train with lower learning rates"
            )
        self.log({f"held_out_{name}": value for name, value in scores.items()} | {"tokens": tokens})
        if self.best["tokens"] == tokens:
            self._save_trained(self.folder / BEST)
        return {}

    def restore_best(self) -> Point:
        """Load the best state, which may be the start, into the model; returns its point of the curve."""
        self._load_trained(self.folder / BEST)
        return self.best

    def _save_trained(self, path: Path) -> None:
        state = full_state(self.model, trained_only=True)
        if self.args.should_save:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")  # safetensors writes files itself: no second copy in memory
            save_file({name: tensor.contiguous() for name, tensor in _untied(state).items()}, partial)
            partial.replace(path)

    def _load_trained(self, path: Path) -> None:
        with readable(str(path)):
            load_full_state(self.model, load_file(path), trained_only=True)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        self._save_trained(Path(output_dir or self.folder) / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._load_trained(Path(resume_from_checkpoint) / WEIGHTS)


def _untied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """One name for each tensor: safetensors refuses shared memory."""
    seen: set[int] = set()
    kept = {}
    for name, tensor in state.items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            kept[name] = tensor
    return kept
