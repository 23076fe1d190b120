"""Attention diagnostics over training: logits, gradients, heads and mixing at two learning rates of each arm."""

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mea.records import Record
from mea.report.formatting import ABSENT, learning_rate
from mea.report.parts import Figure, Part, Table
from mea.report.render.svg import INK, line, logarithmic, short, style, svg, two_panels
from mea.report.sections.pretraining_curves import MILLION, TOKENS, arm_of, arms_of

BINS = 40  # points of a gradient norm's curve
LAST = 0.5  # share of the steps that the table's gradient norm covers
KINDS = ("key", "value")  # mixing matrices
Pair = tuple[Record, Record]


def part(runs: Sequence[Record], suffix: str = "") -> Part | None:
    """Figures and a table of all runs with diagnostics; None if there is none."""
    diagnosed = [run for run in runs if run["samples"].get("largest_logit")]
    if not diagnosed:
        return None
    schedule = diagnosed[0]["config"].get("schedule", "constant")
    pairs = {arm: _pair([run for run in diagnosed if arm_of(run) == arm]) for arm in arms_of(diagnosed)}
    drawn = [make(pairs, schedule) for make in (_logits, _gradients, _heads, _reads)]
    drawn += [_spectra(pairs, schedule, kind) for kind in KINDS]
    text = (
        "One run of each variant, with the first seed: on the left at the best learning rate with diagnostics, on the "
        "right at the largest. The legend gives both learning rates."
    )
    return Part(
        f"Attention diagnostics{suffix}", text, table=_table(diagnosed), figures=[figure for figure in drawn if figure]
    )


def _pair(runs: Sequence[Record]) -> Pair:
    """The run with the lowest loss and the one with the largest learning rate, both with the lowest seed."""
    first = min(run["config"].get("seed", 0) for run in runs)
    runs = [run for run in runs if run["config"].get("seed", 0) == first]
    return min(runs, key=_loss), max(runs, key=lambda run: run["config"]["learning_rate"])


def _loss(run: Record) -> float:
    loss = run["results"].get("validation_loss")
    return np.inf if loss is None or run["results"].get("diverged") else loss


def _logits(pairs: dict[str, Pair], schedule: str) -> Figure | None:
    """Largest scaled score over all layers."""

    def curve(run: Record) -> tuple[NDArray, NDArray]:
        largest = [_largest(layers) for layers in run["samples"]["largest_logit"]]
        return _tokens(run), np.array(largest)

    text = "Largest attention logit of any layer and head, on eight validation rows. Infinite values are not drawn."
    return _curves(f"inside-logits-{schedule}", pairs, curve, "largest attention logit", text)


def _gradients(pairs: dict[str, Pair], schedule: str) -> Figure | None:
    """Largest norm of the gradient in every part of the run."""

    def curve(run: Record) -> tuple[NDArray, NDArray]:
        norms = _numbers(run["samples"].get("grad_norm"))
        cuts = np.linspace(0, len(norms), BINS + 1).astype(int)
        parts = [norms[a:b] for a, b in pairwise(cuts) if b > a]
        settings = run["config"].get("settings") or {}
        batch = settings.get("optim", {}).get("batch_tokens") or run["config"]["tokens"] / max(1, len(norms))
        return cuts[1:][: len(parts)] * batch / MILLION, np.array(
            [np.nanmax(p) if np.isfinite(p).any() else np.nan for p in parts]
        )

    text = f"Norm of the gradient before clipping: the largest in every {BINS}th part of the run."
    return _curves(f"inside-gradients-{schedule}", pairs, curve, "gradient norm", text)


def _heads(pairs: dict[str, Pair], schedule: str) -> Figure | None:
    """RMS of the heads at the input of the output projection, layer by layer, at the end of the run."""

    def curve(run: Record) -> tuple[NDArray, NDArray]:
        values = [_rms(layer) for layer in run["samples"]["head_rms"][-1]]
        return np.arange(1, len(values) + 1), np.array(values)

    text = "Root mean square of a layer's heads at the input of the output projection, at the end of the run."
    return _curves(f"inside-heads-{schedule}", pairs, curve, "RMS of a layer's heads", text, x="layer")


def _reads(pairs: dict[str, Pair], schedule: str) -> Figure | None:
    """RMS of the attention output before any norm, against the number of tokens seen, at the end of the run."""

    def curve(run: Record) -> tuple[NDArray, NDArray]:
        layers = [x for x in (run["samples"].get("read_rms") or [[]])[-1] if x]
        if not layers:
            return np.empty(0), np.empty(0)
        values = np.sqrt(np.mean(np.square([_numbers(x) for x in layers]), axis=0))
        return 2.0 ** np.arange(len(values)), values

    label = "RMS of attention output"
    text = (
        "Root mean square of the attention output before any norm, over all layers, at the end of the run, by the "
        "number of tokens seen (n to 2n - 1). Dotted: 1 / sqrt(n), which the mean of n independent values would follow."
    )
    return _curves(f"inside-reads-{schedule}", pairs, curve, label, text, x="tokens seen, n", reference=True)


def _spectra(pairs: dict[str, Pair], schedule: str, kind: str) -> Figure | None:
    """Condition number of the mixing matrices, the largest of all layers."""

    def curve(run: Record) -> tuple[NDArray, NDArray]:
        spectra = run["samples"].get(f"{kind}_mixing") or []
        return _tokens(run)[: len(spectra)], np.array([_condition(layers) for layers in spectra])

    text = f"Condition number of {kind} mixing (largest singular value over the smallest), the largest of all layers."
    return _curves(f"inside-{kind}-mixing-{schedule}", pairs, curve, f"condition number, {kind} mixing", text)


def _curves(
    name: str,
    pairs: dict[str, Pair],
    curve: Callable[[Record], tuple[NDArray, NDArray]],
    label: str,
    text: str,
    *,
    x: str = TOKENS,
    reference: bool = False,
) -> Figure | None:
    """Two panels with a curve for every arm on a logarithmic axis; None if no run has one."""
    shown: set[str] = set()
    top = 0.0
    with style(name):
        figure, panels = two_panels(("best learning rate", "largest learning rate"), x, label)
        for side, axes in enumerate(panels):
            for index, (arm, pair) in enumerate(pairs.items()):
                where, values = curve(pair[side])
                good = np.isfinite(values) & (values > 0)
                if good.any():
                    rates = " / ".join(learning_rate(run["config"]["learning_rate"]) for run in pair)
                    title = None if arm in shown else f"{short(arm)} ({rates})"  # once for both panels
                    axes.plot(where[good], values[good], label=title, **line(index, size=3))
                    shown.add(arm)
                    top = max(top, values[good][0])
            if reference and shown:
                n = 2.0 ** np.arange(9)
                axes.plot(n, top / np.sqrt(n), color=INK, linewidth=0.8, linestyle=":")
                axes.set_xscale("log", base=2)
        if not shown:
            return None
        for axes in panels:
            logarithmic(axes)
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
        figure.set_figheight(3.4 + 0.25 * -(-len(shown) // 2))
        return Figure(name, svg(figure), text)


def _table(runs: Sequence[Record]) -> Table:
    """One line for every arm and rate: means over seeds at the end of the runs."""
    header = ["variant", "learning rate", "loss", "largest logit", "gradient norm", "head RMS, layer 1"]
    header += ["largest : smallest head RMS", *(f"condition number, {kind} mixing" for kind in KINDS)]
    lines = []
    for arm in arms_of(runs):
        own = [run for run in runs if arm_of(run) == arm]
        for rate in sorted({run["config"]["learning_rate"] for run in own}):
            cell = [run for run in own if run["config"]["learning_rate"] == rate]
            loss = np.mean([_loss(run) for run in cell])
            numbers = [
                _mean(_largest(run["samples"]["largest_logit"][-1]) for run in cell),
                _mean(_late(run["samples"].get("grad_norm")) for run in cell),
                _mean(_rms(run["samples"]["head_rms"][-1][0]) for run in cell),
                _mean(_condition(run["samples"]["head_rms"][-1]) for run in cell),
                *(_mean(_condition((run["samples"].get(f"{k}_mixing") or [[]])[-1]) for run in cell) for k in KINDS),
            ]
            shown = "diverged" if np.isinf(loss) else f"{loss:.3f}"
            lines.append([arm, learning_rate(rate), shown, *map(_shown, numbers)])
    note = (
        f"At the end of the runs, means over seeds; the largest of all layers. Gradient norm: median over the last "
        f"{100 * LAST:g} % of the steps, before clipping. Head RMS: root mean square of a head at the input of the "
        "output projection; with a norm it is the norm's gain."
    )
    return Table(header, lines, note)


def _shown(value: float | int) -> str:
    return ABSENT if np.isnan(value) else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _tokens(run: Record) -> NDArray:
    return np.array(run["samples"]["validation_tokens"], float) / MILLION


def _numbers(values: Any) -> NDArray:
    return np.array([np.nan if value is None else value for value in values or []], float)


def _largest(layers: Sequence[float | None]) -> float:
    values = _numbers(layers)
    values = values[np.isfinite(values)]
    return float(values.max()) if len(values) else np.nan


def _rms(values: Sequence[float | None]) -> float:
    return float(np.sqrt(np.mean(np.square(_numbers(values)))))


def _condition(layers: Iterable[Sequence[float | int]]) -> float:
    """Largest value over the smallest within a layer, the largest of these ratios."""
    ratios = [max(values) / min(values) for values in layers if values and None not in values and min(values) > 0]
    return max(ratios, default=np.nan)


def _late(norms: Any) -> float:
    values = _numbers(norms)
    values = values[int(LAST * len(values)) :]
    return float(np.nanmedian(values)) if np.isfinite(values).any() else np.nan


def _mean(values: Iterable[float]) -> float:
    finite = [value for value in values if np.isfinite(value)]
    return float(np.mean(finite)) if finite else np.nan
