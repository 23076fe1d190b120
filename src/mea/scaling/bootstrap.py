"""Bootstrap replicates of curves and of final losses, over seeds and blocks.

A multiplier bootstrap: each seed's deviation from the mean over seeds is multiplied by a normal number. With the few
seeds that one has, resampling them would give a handful of different replicates and intervals that are too narrow;
the multipliers give replicates whose spread over ``S`` seeds is that of Student's t with ``S - 1`` degrees of
freedom.

- *Seeds*: the deviation of a whole curve, the same along it.
- *Blocks*: what is left, in blocks of neighbouring evaluations, each with a number of its own.
- *Text*: if the losses of blocks of the validation text are known, their deviations likewise.

The numbers depend on the seed and on nothing else: replicates of different cells go together, runs with the same seed
are pairs, and what they share cancels in differences. A cell with one seed takes pooled noise, drawn independently,
because one seed does not show what it shares with others.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import chi2

from mea.scaling.runs import Cell

FARTHEST = 7.0  # in log loss, that a replicate moves: two seeds have tails without end, which is no loss any more


@dataclass(frozen=True)
class SeedNoise:
    """Standard deviation of the log loss between seeds, pooled over cells, and its degrees of freedom."""

    deviation: float
    freedom: int


@dataclass(frozen=True)
class Draws:
    """A source of replicates; the same arguments give the same numbers."""

    count: int = 4000
    seed: int = 0

    def normals(self, name: str, *shape: int) -> NDArray:
        """Standard normal numbers ``[count, *shape]`` that depend on the name only."""
        return np.random.default_rng([self.seed, zlib.crc32(name.encode())]).standard_normal((self.count, *shape))

    def stretch(self, freedom: int) -> NDArray:
        """``[count]``: makes normal replicates into those of Student's t."""
        u = np.random.default_rng([self.seed, 1]).uniform(size=self.count)
        return np.sqrt(freedom / chi2.ppf(u, freedom))

    def finals(self, cell: Cell, noise: SeedNoise | None) -> NDArray:
        """Replicates ``[count]`` of the mean final loss over seeds; a cell with one seed takes the pooled noise."""
        logs = np.log(cell.finals)
        if len(logs) > 1:
            moved = self._between([f"seed {s}" for s in cell.seeds], logs[:, None])[:, 0]
        elif noise is not None:
            moved = self._taken(cell, noise)
        else:
            moved = np.zeros(self.count)
        return np.exp(logs.mean() + np.clip(moved + self._text(cell)[:, 0], -FARTHEST, FARTHEST))

    def curves(
        self, cell: Cell, tokens: NDArray, losses: NDArray, residual: NDArray, noise: SeedNoise | None
    ) -> NDArray:
        """Replicates ``[count, n]`` of the mean curve over seeds.

        Parameters
        ----------
        cell, tokens, losses
            The cell, and what `Cell.curves` gives for it, or a part of that.
        residual : array ``[n]``
            Of a fit, in log loss: stands in for deviations between seeds where there is one seed only.
        noise
            As in `finals`.
        """
        logs = np.log(losses)
        seeds = [run.seed for run in cell.runs if not run.diverged and len(run.tokens)]
        names = [f"seed {seed}" for seed in seeds]
        if len(seeds) > 1:
            deviation = logs - logs.mean(0)
            moved = self._between(names, deviation.mean(1, keepdims=True))
            rest = (deviation - deviation.mean(1, keepdims=True)) / np.sqrt(len(seeds) * (len(seeds) - 1))
        else:
            moved = np.zeros((self.count, 1)) if noise is None else self._taken(cell, noise)[:, None]
            rest = (residual - residual.mean())[None]
        length = max(2, len(tokens) // 6)
        # Blocks begin elsewhere in every replicate, so that no two neighbours are always apart.
        start = np.random.default_rng([self.seed, 2]).integers(length, size=self.count)
        block = (np.arange(len(tokens)) + start[:, None]) // length
        for name, row in zip(names, rest, strict=True):
            numbers = self.normals(f"{name} blocks", int(block.max()) + 1)
            moved = moved + np.take_along_axis(numbers, block, 1) * row
        text = self._text(cell, tokens)
        return np.exp(logs.mean(0) + np.clip(moved + text, -FARTHEST, FARTHEST))

    def _taken(self, cell: Cell, noise: SeedNoise) -> NDArray:
        """``[count]``: what another seed would move a cell with one seed by."""
        return noise.deviation * self.stretch(noise.freedom) * self.normals(f"{cell.arm} at {cell.lr}")

    def _between(self, names: Sequence[str], deviation: NDArray) -> NDArray:
        """``[count, n]``: replicates of the mean of the rows of `deviation` around itself."""
        size = len(names)
        numbers = np.stack([self.normals(name) for name in names], 1)
        centred = deviation - deviation.mean(0)
        return self.stretch(size - 1)[:, None] * (numbers @ centred) / np.sqrt(size * (size - 1))

    def _text(self, cell: Cell, tokens: NDArray | None = None) -> NDArray:
        """What another validation text would change, ``[count, n]`` or ``[count, 1]``; 0 if unknown."""
        runs = [run for run in cell.runs if not run.diverged]
        if not runs or any(run.blocks is None or not len(run.blocks) for run in runs):
            return np.zeros((self.count, 1))
        rows = []
        for run in runs:
            assert run.blocks is not None
            chosen = run.blocks[-1:] if tokens is None else run.blocks[np.isin(run.tokens, tokens)]
            rows.append(chosen / chosen.mean(1, keepdims=True) - 1)
        relative = np.mean(rows, axis=0)
        size = relative.shape[1]
        return self.normals("text", size) @ relative.T / np.sqrt(size * (size - 1))


def pooled_noise(cells: Sequence[Cell]) -> SeedNoise | None:
    """Seed noise over the cells with several seeds and no divergence; None if there are none."""
    groups = [np.log(cell.finals) for cell in cells if len(cell.runs) > 1 and not cell.diverged]
    freedom = sum(len(group) - 1 for group in groups)
    if not freedom:
        return None
    return SeedNoise(float(np.sqrt(sum(((g - g.mean()) ** 2).sum() for g in groups) / freedom)), freedom)


def interval(replicates: NDArray, level: float = 0.95, *, discrete: bool = False) -> list[float]:
    """Percentile interval along the first axis of the finite replicates; its ends are two of them if `discrete`."""
    tail = 100 * (1 - level) / 2
    kept = replicates[np.isfinite(replicates)]
    method = "inverted_cdf" if discrete else "linear"
    return [float(x) for x in np.percentile(kept, [tail, 100 - tail], method=method)] if len(kept) else []
