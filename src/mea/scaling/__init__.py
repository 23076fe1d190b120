"""Scaling: records of pretraining in, numbers out (NumPy and SciPy only, no torch).

`fit_records` turns records of the kind ``"pretraining"`` into one of the kind ``"fit"``: fits of ``L(D)``, the best
learning rate of every arm, stability, sensitivity to the learning rate, differences between arms, and whether the fit
predicts. An *arm* is what is compared at its own best learning rate (a variant, or a variant with a control); a *cell*
is one arm at one learning rate and one schedule, with a run for every seed.

Fields of a pretraining record that are read:

- ``config``: ``variant``, ``learning_rate`` (peak), ``schedule``, ``tokens`` (planned), ``preset``; if there are such,
  ``arm`` (name in tables, instead of the variant's), ``mixing`` (``"none"``, ``"k"``, ``"v"``, ``"kv"``) and ``norm``
  for the factorial effects, ``warmup_tokens``;
- the seed: ``config.seed``, or the first of ``seeds``; the same seed means the same order of the data, so that runs of
  different arms are pairs;
- ``results``: ``validation_loss`` (at the end, nats per token), ``diverged``, ``initial_loss`` (before the first step);
- ``samples``: ``train_loss`` and ``grad_norm``, one value for every step (None where not finite);
  ``validation_tokens`` and
  ``validation_loss``, one value for every evaluation; ``validation_blocks`` (evaluations × fixed blocks of the
  validation text) if the blocks' losses were kept.
"""

from mea.scaling.fit import FitSettings, fit_records
from mea.scaling.power_law import PowerLaw, fit_power_law
from mea.scaling.runs import Cell, Run, cells_of, read_runs
from mea.scaling.stability import spike_distances, spike_score

__all__ = [
    "Cell",
    "FitSettings",
    "PowerLaw",
    "Run",
    "cells_of",
    "fit_power_law",
    "fit_records",
    "read_runs",
    "spike_distances",
    "spike_score",
]
