"""The Hugging Face Trainer with this package's optimiser groups, data order and validation."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, SequentialSampler, Subset
from transformers import Trainer, TrainingArguments

from mea.attention.mixing import FrequencyMixing, HeadMixing
from mea.train.fsdp import is_sharded, load_state, load_weights, save_state
from mea.train.pretraining.dataset import IGNORED, collate
from mea.train.pretraining.diagnostics import inspect

INSPECTED = 8  # validation rows on which attention is looked into


def parameter_groups(model: nn.Module, rate: float, decay: float, mixer_multiplier: float) -> list[dict[str, Any]]:
    """Matrices with weight decay; mixing matrices and vectors without, the former at their own learning rate."""
    mixing = {id(p) for m in model.modules() if isinstance(m, HeadMixing | FrequencyMixing) for p in m.parameters()}
    groups: dict[str, list[nn.Parameter]] = {"matrices": [], "vectors": [], "mixing": []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            kind = "mixing" if id(parameter) in mixing else "matrices" if parameter.dim() > 1 else "vectors"
            groups[kind].append(parameter)
    rates = {"matrices": rate, "vectors": rate, "mixing": rate * mixer_multiplier}
    return [
        {"params": found, "lr": rates[kind], "weight_decay": decay if kind == "matrices" else 0.0}
        for kind, found in groups.items()
        if found
    ]


class PretrainTrainer(Trainer):
    """Rows come in the data set's own order, which is the shuffled one; validation scores every token alike."""

    def __init__(
        self, model: Any, args: TrainingArguments, *, mixer_multiplier: float, validation_batch: int, **kwargs: Any
    ) -> None:
        args.save_only_model = is_sharded(model)  # else it refuses, not knowing that this class can save such states
        super().__init__(model, args, **kwargs)
        args.save_only_model = False
        self.mixer_multiplier, self.validation_batch = mixer_multiplier, validation_batch

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)  # pyright: ignore

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            args = self.args
            model = self.model if model is None else model
            groups = parameter_groups(model, args.learning_rate, args.weight_decay, self.mixer_multiplier)
            betas, eps = (args.adam_beta1, args.adam_beta2), args.adam_epsilon
            self.optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=betas, eps=eps, fused=True)
        assert self.optimizer is not None
        return self.optimizer

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if is_sharded(self.model):
            save_state(self.model, self.optimizer, self.lr_scheduler, Path(output_dir), self.args.should_save)  # pyright: ignore
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and is_sharded(self.model):
            load_state(self.model, self.optimizer, self.lr_scheduler, Path(checkpoint))  # pyright: ignore
        else:
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if is_sharded(self.model):
            load_weights(self.model, Path(resume_from_checkpoint))  # pyright: ignore[reportArgumentType]
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    @torch.no_grad()
    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Mean loss per token over the validation rows, and that of every row (``eval_blocks`` of the history).

        The rows are shared out among processes, in equal numbers: some are scored twice and counted once.
        """
        model: Any = self.model_wrapped
        rows: Any = self.eval_dataset
        training = model.training
        model.eval()
        sums, counts = [], []
        rank, processes = self.args.process_index, self.args.world_size
        few = collate([rows[i] for i in range(min(INSPECTED, len(rows)))])
        mine = [i % len(rows) for i in range(rank, -(-len(rows) // processes) * processes, processes)]
        for batch in DataLoader(Subset(rows, mine), self.validation_batch, collate_fn=collate):
            batch = self._prepare_inputs(batch)
            labels = batch.pop("labels")[:, 1:]
            with self.compute_loss_context_manager():
                logits = model(**batch, use_cache=False).logits[:, :-1]
            flat = logits.float().flatten(0, 1)
            loss = F.cross_entropy(flat, labels.flatten(), ignore_index=IGNORED, reduction="none")
            sums.append(loss.view_as(labels).sum(1))
            counts.append((labels != IGNORED).sum(1))
        total, count = (self._of_all_processes(torch.cat(x), len(rows)) for x in (sums, counts))
        metrics = {"eval_loss": (total.sum() / count.sum()).item()}
        self.log(metrics)
        history: list[dict[str, Any]] = self.state.log_history
        history[-1]["eval_blocks"] = (total / count).tolist()  # not logged: a reporter could not show it
        few = self._prepare_inputs(few)
        del few["labels"]
        with self.compute_loss_context_manager():
            found = inspect(self.model, lambda: self.model(**few, use_cache=False))  # pyright: ignore
        history[-1]["inspection"] = found
        model.train(training)
        return metrics

    def _of_all_processes(self, values: Tensor, rows: int) -> Tensor:
        """Values of the rows in their order, in fp64 on the CPU."""
        processes = self.args.world_size
        parts = [torch.empty_like(values) for _ in range(processes)]
        if processes > 1:
            dist.all_gather(parts, values)
        else:
            parts = [values]
        return torch.stack(parts, 1).flatten()[:rows].double().cpu()
