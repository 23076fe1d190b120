"""The callback that ends a run when it diverges."""

import math
from typing import Any

from transformers import TrainerCallback

DIVERGENCE_WINDOW = 50  # steps over which the loss is averaged to tell divergence from a spike


class StopDiverged(TrainerCallback):
    """End a run, without saving, whose loss is not finite, or after the warm-up above `limit` on average."""

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
