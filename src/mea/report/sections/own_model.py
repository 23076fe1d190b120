"""What ``mea compress``, ``mea recover`` and ``mea perplexity`` measured on a model of one's own."""

from collections.abc import Sequence

from mea.records import Record
from mea.report.formatting import ABSENT, with_error
from mea.report.parts import Figure, Part, Section, Table
from mea.report.render.svg import axes_of_a_figure, legend, line, logarithmic, style, svg
from mea.report.sections.comparison_figures import bits_by_layer

COMPRESSION, RECOVERY, PERPLEXITY = KINDS = "compression", "recovery", "perplexity"


def sections(records: Sequence[Record]) -> list[Section]:
    """One section for every compressed model, and one for texts measured one at a time."""
    compressed = [record for record in records if record["kind"] == COMPRESSION]
    trained = [record for record in records if record["kind"] == RECOVERY]
    measured = [record for record in records if record["kind"] == PERPLEXITY]
    models = dict.fromkeys(record["config"]["model"] for record in compressed)
    made = [
        Section(f"Compressed: {model}", _parts([x for x in compressed if x["config"]["model"] == model]))
        for model in models
    ]
    if trained:
        made.append(Section("Trained after compression", [Part(table=_trained(trained))]))
    if measured:
        made.append(Section("Perplexity of single texts", [Part(table=_measured(measured))]))
    return made


def _parts(records: Sequence[Record]) -> list[Part]:
    packed = [record for record in records if record["config"].get("tiers")]
    figures = [bits_by_layer(_name(record), record["config"]) for record in packed]
    if packed:
        figures.append(_expected_loss(packed))
    return [Part(table=_compressed(records)), *([Part("Layer by layer", figures=figures)] if figures else [])]


def _compressed(records: Sequence[Record]) -> Table:
    lines = []
    for record in records:
        config, results = record["config"], record["results"]
        before, after = results["cache_bytes_per_token_before"], results["cache_bytes_per_token"]
        perplexities = [
            ABSENT if results.get(name) is None else f"{results[name]:.2f}"
            for name in ("perplexity_before", "perplexity")
        ]
        lines.append([
            _name(record),
            f"{after / before:.1%}",
            with_error(results.get("perplexity_ratio"), results.get("perplexity_ratio_error")),
            *perplexities,
            f"{after:,.0f}",
            config["calibration_text"],
            f"{results['seconds'] / 60:.1f}",
        ])  # fmt: skip
    texts = dict.fromkeys(
        f"the first {config['measured_tokens']:,} tokens of {config['measured_text']}"
        for config in (record["config"] for record in records)
        if config["measured_tokens"]
    )
    note = f"Perplexity of {', '.join(texts)}; ± is one standard error. " if texts else ""
    note += "The cache is a share of the original's, which has 16 bits a number where the result has codes."
    header = [
        "method",
        "cache",
        "perplexity ratio",
        "perplexity before",
        "after",
        "bytes per token",
        "calibration text",
        "fit, min",
    ]
    return Table(header, lines, note)


def _trained(records: Sequence[Record]) -> Table:
    lines = []
    for record in records:
        config, results = record["config"], record["results"]
        ratios = [with_error(results.get(f"ratio{x}"), results.get(f"ratio{x}_error")) for x in ("_start", "")]
        lines.append([
            config["model"],
            ", ".join(config["texts"]),
            f"{sum(stage['tokens'] for stage in config['stages']):,}",
            f"{results['held_out_start']['ce']:.4f} → {results['held_out']['ce']:.4f}",
            ABSENT if ratios == [ABSENT] * 2 else " → ".join(ratios),
            f"{results['seconds'] / 60:.1f}",
        ])  # fmt: skip
    header = ["model", "texts", "tokens", "loss on held-out text, nats", "perplexity ratio", "minutes"]
    texts = dict.fromkeys(
        record["config"]["measured_text"] for record in records if record["config"]["measured_tokens"]
    )
    note = "Before → after training. The ratio is to the uncompressed model" + (
        f", on {', '.join(texts)}." if texts else "."
    )
    return Table(header, lines, note, texts=2)


def _measured(records: Sequence[Record]) -> Table:
    lines = []
    for record in records:
        config, results = record["config"], record["results"]
        lines.append([
            config["model"],
            with_error(results["perplexity"], results["standard_error"]),
            with_error(results.get("ratio"), results.get("ratio_standard_error")),
            config.get("against") or ABSENT,
            config["text"],
            f"{results['scored_tokens']:,}",
        ])  # fmt: skip
    header = ["model", "perplexity", "ratio", "against", "text", "tokens"]
    return Table(header, lines, "± is one standard error.")


def _expected_loss(records: Sequence[Record]) -> Figure:
    with style("expected-loss"):
        figure, axes = axes_of_a_figure("layer", "expected loss, nats per token (log)")
        for index, record in enumerate(records):
            values = record["results"]["layer_expected_loss"]
            axes.plot(range(len(values)), values, label=_name(record), **line(index, size=4))
        logarithmic(axes)
        axes.xaxis.get_major_locator().set_params(integer=True)
        legend(figure, axes)
        return Figure("expected-loss", svg(figure), "Loss that rounding adds in each layer, by the fit.")


def _name(record: Record) -> str:
    config, results = record["config"], record["results"]
    share = results["cache_bytes_per_token"] / results["cache_bytes_per_token_before"]
    return f"{config['method']}, {100 * share:.3g} %"
