"""Log-likelihoods of given continuations in batches: shared beginnings and unused logits are not computed twice."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mea.evaluate.harness.packing import Packed, Scored, batches, pack, tensors
from mea.models.lm_head import ROWS, InseparableHeadError, head_logits, last_hidden_states
from mea.ops.precision import keep_freed_memory

SMALLEST, LARGEST = 512, 65_536  # tokens of a batch
TRIALS = 3  # batches timed at each size
GAIN = 1.04  # a larger batch must be so much faster to be kept: smaller ones take less memory


@dataclass
class BatchSize:
    """Finds how many tokens a batch should have: doubles while that is faster and memory suffices, then stays."""

    tokens: int = SMALLEST
    settled: bool = False
    _best: float = 0.0
    _rates: list[float] = field(default_factory=list)

    def report(self, tokens: int, seconds: float) -> None:
        """Note how long a batch took."""
        if self.settled or tokens < self.tokens // 2:
            return
        self._rates.append(tokens / max(seconds, 1e-9))
        if len(self._rates) < TRIALS:
            return
        rate, self._rates = max(self._rates), []  # the fastest: what else the machine does only slows it down
        if rate < GAIN * self._best:
            self.tokens, self.settled = self.tokens // 2, True
        elif self.tokens >= LARGEST:
            self.settled = True
        else:
            self._best, self.tokens = rate, 2 * self.tokens

    def too_large(self) -> None:
        """Note that a batch did not fit into memory."""
        self.tokens, self.settled = max(1, self.tokens // 2), True


class Scorer:
    """Scores continuations with one model.

    Parameters
    ----------
    model
        A causal language model of transformers.
    batch_tokens
        Tokens of a batch; None finds them while it works. In bfloat16 the last digits depend on them.

    Attributes
    ----------
    shares
        Whether continuations share their beginnings: only where a trial shows that the model computes the same then.
    """

    def __init__(self, model: Any, batch_tokens: int | None = None):
        keep_freed_memory()
        self.model = model
        self.size = BatchSize(batch_tokens, settled=True) if batch_tokens else BatchSize()
        self.head_alone = self._head_stands_alone()
        self.shares = self._can_share()

    @torch.no_grad()
    def score(self, texts: Sequence[Scored]) -> Iterator[tuple[list[tuple[int, float, bool]], int, int]]:
        """Score all texts, batch by batch.

        Yields
        ------
        results
            ``(index, log-likelihood, whether greedy decoding would write it)`` of the texts that are done.
        done, total
            Tokens.

        Raises
        ------
        ValueError
            The model's logits are not numbers.
        """
        rows = pack(texts, self.shares)
        total, done = sum(len(row.tokens) for row in rows), 0
        while rows:
            batch = next(batches(rows, self.size.tokens))
            began = time.perf_counter()
            try:
                results = self._batch(batch, texts)
            except (torch.OutOfMemoryError, MemoryError):
                if len(batch) == 1:
                    raise
                self.size.too_large()
                continue
            count = sum(len(row.tokens) for row in batch)
            self.size.report(count, time.perf_counter() - began)
            taken = set(map(id, batch))
            rows = [row for row in rows if id(row) not in taken]
            done += count
            yield results, done, total

    def _batch(self, rows: Sequence[Packed], texts: Sequence[Scored]) -> list[tuple[int, float, bool]]:
        wanted = [(number, index, tokens) for number, row in enumerate(rows) for index, tokens in row.targets_at]
        row_of = torch.tensor([number for number, _, tokens in wanted for _ in tokens], device=self.model.device)
        token_of = torch.tensor([token for *_, tokens in wanted for token in tokens], device=self.model.device)
        targets = torch.tensor([x for _, index, _ in wanted for x in texts[index].targets], device=self.model.device)
        losses, greedy = self._losses(rows, row_of, token_of, targets)
        if not losses.isfinite().all():
            raise ValueError(
                "the model's logits are not finite numbers: its weights or activations overflow; try dtype float32"
            )
        results, first = [], 0
        for _, index, tokens in wanted:
            last = first + len(tokens)
            results.append((index, -losses[first:last].double().sum().item(), bool(greedy[first:last].all())))
            first = last
        return results

    def _losses(
        self, rows: Sequence[Packed], row_of: Tensor, token_of: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Loss of each target, and whether it was the likeliest token; on the CPU."""
        states = self._run(rows, body_only=self.head_alone)
        picked = states[row_of, token_of]
        losses, greedy = [], []
        for part, wanted in zip(picked.split(ROWS), targets.split(ROWS), strict=True):
            logits = (head_logits(self.model, part) if self.head_alone else part).float()
            losses.append(functional.cross_entropy(logits, wanted, reduction="none").cpu())
            # The index of the largest is slow to find, its value is not; few targets have it.
            hit = logits.gather(-1, wanted[:, None])[:, 0] == logits.amax(-1)
            at = hit.nonzero()[:, 0]
            hit[at] = logits[at].argmax(-1) == wanted[at]
            greedy.append(hit.cpu())
        return torch.cat(losses), torch.cat(greedy)

    def _run(self, rows: Sequence[Packed], *, body_only: bool) -> Tensor:
        """Hidden states after the last norm, or logits, ``[b, t, ...]``."""
        ids, positions, mask = tensors(rows)
        ids, options = ids.to(self.model.device), {}
        if mask is not None:
            mask, positions = mask.to(self.model.device), positions.to(self.model.device)
            if self.model.config._attn_implementation == "eager":
                low = torch.finfo(self.model.dtype).min
                mask = torch.zeros(mask.shape, dtype=self.model.dtype, device=mask.device).masked_fill_(~mask, low)
            options = {"attention_mask": mask, "position_ids": positions}
        if body_only:
            return last_hidden_states(self.model, ids, **options)
        return self.model(input_ids=ids, use_cache=False, **options).logits

    @torch.no_grad()
    def _head_stands_alone(self) -> bool:
        """Whether logits can be made from some hidden states alone, and not only from all of a batch."""
        ids = torch.zeros(1, 2, dtype=torch.long, device=self.model.device)
        try:
            head_logits(self.model, last_hidden_states(self.model, ids)[0])
        except InseparableHeadError:
            return False
        return True

    @torch.no_grad()
    def _can_share(self) -> bool:
        """Try a row with branches against its texts one by one."""
        config = self.model.config.get_text_config()
        windows = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
        if windows or self.model.config._attn_implementation not in ("sdpa", "eager"):
            return False  # windows are part of a mask that the branches' mask would replace
        if getattr(config, "cache_code", None):
            return False  # which tokens are read exactly depends on places in the row, not on positions
        size = self.model.get_input_embeddings().weight.shape[0]
        texts = [Scored(tuple(x % size for x in range(3, 12)) + (i % size,) * 5, (0,)) for i in (1, 2)]
        try:
            (row,) = pack(texts)
            together = self._run([row], body_only=False)[0].float()
            apart = [self._run([alone], body_only=False)[0].float() for alone in pack(texts, share=False)]
        except (TypeError, ValueError, NotImplementedError, RuntimeError):
            return False
        last = [token for _, (token,) in row.targets_at]
        error = max((together[token] - one[-1]).abs().max().item() for token, one in zip(last, apart, strict=True))
        scale = max(one.abs().max().item() for one in apart)
        return error <= 4 * torch.finfo(self.model.dtype).eps ** 0.75 * max(scale, 1e-6)
