"""What watches a run: what is logged becomes its record; divergence ends it; speed is told."""

import math
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import TrainerCallback

from mea.records import Progress
from mea.train.checkpoints import mark_complete

DIVERGENCE_WINDOW = 50  # steps over which the loss is averaged to tell divergence from a spike


class StopDiverged(TrainerCallback):
    """End a run whose loss is not finite, or far above that of a uniform guess after the warm-up; save nothing then."""

    def __init__(self, limit: float, warmup_steps: int) -> None:
        self.limit, self.warmup_steps, self.reason = limit, warmup_steps, ""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **_: Any) -> None:
        if not logs or "loss" not in logs:
            return
        loss, norm = logs["loss"], float(logs.get("grad_norm", 0.0))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.reason = f"loss {loss} and gradient norm {norm} at step {state.global_step}"
        else:
            recent = [entry["loss"] for entry in state.log_history if "loss" in entry][-DIVERGENCE_WINDOW:]
            mean = sum(recent) / len(recent)
            late = state.global_step > self.warmup_steps + DIVERGENCE_WINDOW and len(recent) == DIVERGENCE_WINDOW
            if late and mean > self.limit:
                self.reason = f"mean loss {mean:.2f} over {len(recent)} steps at step {state.global_step}"
        if self.reason:
            control.should_training_stop, control.should_save, control.should_evaluate = True, False, False


class MarkCheckpoints(TrainerCallback):
    """Say of a checkpoint that it is complete, once it is."""

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if dist.is_initialized():
            dist.barrier()  # the others' parts are written
        if state.is_world_process_zero:
            mark_complete(Path(args.output_dir) / f"checkpoint-{state.global_step}")


class TellProgress(TrainerCallback):
    """Steps done, with tokens per second and model-FLOPs utilisation; the bar itself counts the time left."""

    def __init__(self, report: Progress, tokens: int, flops: int, peak: float) -> None:
        self.report, self.tokens, self.flops, self.peak = report, tokens, flops, peak
        self.start, self.first = time.perf_counter(), 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.start, self.first = time.perf_counter(), state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            rate = (state.global_step - self.first) / (time.perf_counter() - self.start)
            speed = f"{rate * self.tokens:,.0f} tokens/s, {rate * self.flops / self.peak:.0%} MFU"
            self.report(f"steps ({speed})", state.global_step, state.max_steps)
