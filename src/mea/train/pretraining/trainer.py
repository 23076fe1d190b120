"""The Trainer of pretraining: optimiser groups, and validation that scores every token alike."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from transformers import TrainingArguments

from mea.attention.mixing import FrequencyMixing, HeadMixing
from mea.train.fsdp import is_sharded
from mea.train.pretraining.dataset import IGNORED, collate
from mea.train.pretraining.diagnostics import Diagnostics, attention_diagnostics
from mea.train.pretraining.recall import RecallRows
from mea.train.trainer import BaseTrainer

DIAGNOSTIC_ROWS = 8  # validation rows on which attention is diagnosed


def parameter_groups(model: nn.Module, lr: float, decay: float, mixer_multiplier: float) -> list[dict[str, Any]]:
    """Matrices with weight decay; mixing matrices and vectors without, the former at their own learning rate."""
    mixing = {id(p) for m in model.modules() if isinstance(m, HeadMixing | FrequencyMixing) for p in m.parameters()}
    groups: dict[str, list[nn.Parameter]] = {"matrices": [], "vectors": [], "mixing": []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            kind = "mixing" if id(parameter) in mixing else "matrices" if parameter.dim() > 1 else "vectors"
            groups[kind].append(parameter)
    lrs = {"matrices": lr, "vectors": lr, "mixing": lr * mixer_multiplier}
    return [
        {"params": parameters, "lr": lrs[kind], "weight_decay": decay if kind == "matrices" else 0.0}
        for kind, parameters in groups.items()
        if parameters
    ]


class PretrainTrainer(BaseTrainer):
    """Scores validation rows one by one, and looks into attention on some of them."""

    def __init__(self, model: Any, args: TrainingArguments, *, mixer_multiplier: float, **options: Any) -> None:
        self.mixer_multiplier = mixer_multiplier
        super().__init__(model, args, sharded=is_sharded(model), data_collator=collate, **options)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """As the function of this name."""
        return parameter_groups(self.model, self.args.learning_rate, self.args.weight_decay, self.mixer_multiplier)

    @torch.no_grad()
    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Mean loss per token over the validation rows, and that of every row (``eval_blocks`` of the history).

        Of a recall task, also the accuracy for each number of pairs (``accuracy`` of the history).
        The rows are shared out among processes, in equal numbers: some are scored twice and counted once.
        """
        model: Any = self.model_wrapped
        rows: Any = self.eval_dataset
        training = model.training
        model.eval()
        sums, counts, hits = [], [], []
        rank, processes = self.args.process_index, self.args.world_size
        mine = [i % len(rows) for i in range(rank, -(-len(rows) // processes) * processes, processes)]
        for batch in DataLoader(Subset(rows, mine), self.args.per_device_train_batch_size, collate_fn=collate):
            batch = self._prepare_inputs(batch)
            labels = batch.pop("labels")[:, 1:]
            with self.compute_loss_context_manager():
                logits = model(**batch, use_cache=False).logits[:, :-1]
            flat = logits.float().flatten(0, 1)
            loss = F.cross_entropy(flat, labels.flatten(), ignore_index=IGNORED, reduction="none")
            sums.append(loss.view_as(labels).sum(1))
            counts.append((labels != IGNORED).sum(1))
            hits.append((logits.argmax(-1) == labels).sum(1))
        total, count, hit = (self._of_all_processes(torch.cat(x), len(rows)) for x in (sums, counts, hits))
        metrics = {"eval_loss": (total.sum() / count.sum()).item()}
        self.log(metrics)
        history: list[dict[str, Any]] = self.state.log_history
        history[-1]["eval_blocks"] = (total / count).tolist()  # not logged: a reporter could not show it
        if isinstance(rows, RecallRows):
            history[-1]["accuracy"] = rows.mean_by_pairs(hit / count)
        history[-1]["diagnostics"] = self._diagnostics(rows)
        model.train(training)
        return metrics

    def _diagnostics(self, rows: Any) -> Diagnostics:
        batch = self._prepare_inputs(collate([rows[i] for i in range(min(DIAGNOSTIC_ROWS, len(rows)))]))
        del batch["labels"]
        with self.compute_loss_context_manager():
            return attention_diagnostics(self.model, lambda: self.model(**batch, use_cache=False))

    def _of_all_processes(self, values: Tensor, rows: int) -> Tensor:
        """Values of the rows in their order, in fp64 on the CPU."""
        processes = self.args.world_size
        parts = [torch.empty_like(values) for _ in range(processes)]
        if processes > 1:
            dist.all_gather(parts, values)
        else:
            parts = [values]
        return torch.stack(parts, 1).flatten()[:rows].double().cpu()
