"""The fields of records that sections read, by kind; the error for a missing field names file and field.

A pair is a type and a default: such a field may be missing. Fields that are not listed here are free.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, create_model

from mea.records import Record


def _two_ends(values: list[float]) -> list[float]:
    if len(values) not in (0, 2):
        raise ValueError(f"an interval has two ends, not {len(values)}")
    return values


def _same_length(samples: Any) -> Any:
    if len(samples.validation_tokens) != len(samples.validation_loss):
        raise ValueError("validation_tokens and validation_loss differ in length")
    if samples.largest_logit and not (samples.head_rms and samples.head_rms[-1]):
        raise ValueError("largest_logit is there and head_rms is not")
    if samples.accuracy is not None and len(samples.accuracy) != len(samples.validation_tokens):
        raise ValueError("validation_tokens and accuracy differ in length")
    return samples


def _accuracy_by_pairs(record: Any) -> Any:
    if any(len(entry) != len(record.config.pairs) for entry in record.samples.accuracy or ()):
        raise ValueError("samples.accuracy has not one value for each of config.pairs")
    return record


def _cells_of_samples(record: Any) -> Any:
    cells = {(cell.task, str(cell.tokens)) for cell in record.results.cells}
    for task, lengths in (record.samples.__pydantic_extra__ or {}).items():
        for tokens in lengths:
            if (task, tokens) not in cells:
                raise ValueError(f"samples.{task}.{tokens} has no cell in results.cells")
    return record


def _loss_of_codes(record: Any) -> Any:
    if record.config.tiers and not record.results.layer_expected_loss:
        raise ValueError("config.tiers is there and results.layer_expected_loss is not")
    return record


def _main_is_measured(results: Any) -> Any:
    if results.main not in results.metrics:
        raise ValueError(f"main names {results.main!r}, which is no metric")
    return results


Interval = Annotated[list[float], AfterValidator(_two_ends)]  # empty where there is none
Scores = Annotated[list[float], Field(min_length=1)]
Curve = list[float | None]  # None where a value was not finite
number, text = (float | None, None), (str | None, None)  # may be missing


def fields(**types: Any) -> Any:
    """An object of a record; numbers are not read from text, nor text from numbers."""
    config = ConfigDict(strict=True, protected_namespaces=())
    return create_model("Fields", __config__=config, **types)


def record(config: dict[str, Any], results: Any, samples: Any = dict) -> Any:
    """A whole record, as far as sections read it."""
    return fields(config=fields(**config), results=results, samples=samples)


def _runs() -> Any:
    settings = fields(optim=(fields(batch_tokens=number), None))
    config = {"tokens": int, "learning_rate": float, "variant": str, "arm": text, "preset": text, "seed": (int, 0)}
    config |= {"schedule": (str, "constant"), "settings": (settings | None, None), "pairs": (list[int], [])}
    layers = (list[list[Curve | None]] | None, None)
    samples = {"validation_tokens": (list[float], []), "validation_loss": (Curve, [])}
    samples |= dict.fromkeys(("train_loss", "grad_norm"), (Curve | None, None))
    samples |= {"largest_logit": (list[Curve] | None, None), "head_rms": (list[list[Curve]] | None, None)}
    samples |= {"accuracy": (list[Scores] | None, None)}
    samples |= dict.fromkeys(("read_rms", "key_mixing", "value_mixing"), layers)
    whole = record(
        config,
        fields(validation_loss=number, diverged=(bool, False)),
        Annotated[fields(**samples), AfterValidator(_same_length)],
    )
    return Annotated[whole, AfterValidator(_accuracy_by_pairs)]


def _fits() -> Any:
    score = fields(score=float, interval=Interval)
    constant = fields(value=float, interval=Interval)
    correlation = fields(correlation=float | None, interval=Interval)
    rules = dict[str, fields(probability=float, regret=float, lrs=(Interval, []))]
    cell = fields(
        arm=str, lr=float, seeds=list[int], loss=float, interval=Interval, diverged=int, spiked=int,
        spikes=dict[str, score],
    )  # fmt: skip
    held = fields(predicted=float, interval=Interval, actual=float, error=float, error_interval=Interval)
    law = fields(
        arm=str, lr=float, exponent=constant, scale=constant, floor=constant, residual=float, exponent_at_edge=bool,
        replicates_at_edge=float, held=held, horizon=fields(tokens=float, predicted=float, interval=Interval),
    )  # fmt: skip
    arm = fields(
        arm=str, best_lr=float, best_inside=bool, loss=float, interval=Interval, probability_best=float,
        paper_lr=float | None, paper_loss=float | None, predicted_lr=float | None, rules=rules,
        sensitivity=(float, 0.0), sensitivity_interval=(Interval, []), sensitivity_lrs=(Interval, []),
    )  # fmt: skip
    difference = fields(
        first=str, second=str, difference=float, interval=Interval, interval_with_choice=Interval,
        probability_lower=float, pairs=int,
    )  # fmt: skip
    prediction = fields(
        arm=str, cells=int, held=correlation, early=correlation, mean_error=float, largest_error=float, covered=int
    )
    group = fields(
        seed_noise=fields(deviation=float, freedom=int) | None, cells=list[cell], fits=list[law], arms=list[arm],
        differences=list[difference], effects=list[fields(effect=str, value=float, interval=Interval)],
        prediction=list[prediction],
    )  # fmt: skip
    decay = fields(
        arm=str, schedule=str, lrs=list[Any], interval=Interval, gain=float, rules=rules, best_constant=float,
        best_decayed=float, correlation=float | None, best_constant_arm=text, best_decayed_arm=text,
    )  # fmt: skip
    config = {"tokens": int, "preset": text, "draws": int, "held": float, "horizon": float, "runs": int}
    curve = fields(schedule=str, arm=str, lr=float, tokens=list[float], fitted=list[float])
    results = fields(groups=dict[str, group], after_decay=(list[decay], []))
    return record(config, results, fields(curves=list[curve]))


def _comparisons() -> Any:
    counts = dict.fromkeys(("tokens", "window", "context"), (int, 0))
    errors = {"standard_error": number, "ratio_standard_error": number}
    scored = dict[str, fields(perplexity=number, ratio=number, **errors, **counts)]
    stretch = fields(start=int, stop=int, ratio=number, ratio_standard_error=number)
    ends = dict.fromkeys(("ratio_low", "ratio_high"), (float, 0.0))
    decode = fields(seconds=number, ratio=number, context=(int, 0), dtype=text, **ends)
    results = fields(
        texts=(scored, {}),
        continuations=(scored, {}),
        positions=(list[stretch] | None, None),
        cache=(fields(bytes_per_token=number) | None, None),
        decode=(decode | None, None),
        compress_seconds=number,
        layers=(fields(what=(str, ""), values=list[float]) | None, None),
        continuation=(fields(prompt=str, text=str) | None, None),
    )
    tiers = (list[list[list[int]] | None] | None, None)
    return record(
        {"keep": number, "label": text, "series": text, "tiers": tiers, "numbers": (int | None, None)},
        results,
        fields(decode_seconds=(dict[str, Scores] | None, None)),
    )


def _compressions() -> Any:
    sizes = dict.fromkeys(("cache_bytes_per_token_before", "cache_bytes_per_token", "seconds"), float)
    scores = ("perplexity_before", "perplexity", "perplexity_ratio", "perplexity_ratio_error")
    config = {"model": str, "method": str, "calibration_text": str, "measured_text": str, "measured_tokens": int}
    config |= {"tiers": (list[list[list[int]] | None] | None, None), "numbers": (int | None, None)}
    results = fields(**sizes, **dict.fromkeys(scores, number), layer_expected_loss=(list[float] | None, None))
    return Annotated[record(config, results), AfterValidator(_loss_of_codes)]


def _recoveries() -> Any:
    config = {"model": str, "texts": list[str], "stages": list[fields(tokens=int)]}
    config |= {"measured_text": str, "measured_tokens": int}
    ratios = dict.fromkeys(("ratio", "ratio_error", "ratio_start", "ratio_start_error"), number)
    return record(config, fields(held_out_start=fields(ce=float), held_out=fields(ce=float), seconds=float, **ratios))


def _perplexities() -> Any:
    results = fields(
        scored_tokens=int, perplexity=float, standard_error=number, ratio=number, ratio_standard_error=number
    )
    return record({"model": str, "text": str, "against": text}, results)


def _profiles() -> Any:
    config = {"model": str, "method": str, "keep": float, "layers": int, "layouts": dict[str, list[int]]}
    config |= {"text": str, "tokens": int, "window": int}
    return record(config, fields(layers=list[fields(added=float, standard_error=float, lost=float)]))


def _tasks() -> Any:
    config = {"label": str, "task": str, "suite": text, "parameters": int, "dtype": str, "limit": int | None}
    results = fields(items=int, metrics=dict[str, fields(mean=float, standard_error=float | None)], main=str)
    return record(config, Annotated[results, AfterValidator(_main_is_measured)])


GAP = {"difference": float, "interval": Interval}
ITEM_GAP = GAP | {"items": int, "p_value": float | None}


def _paired_tasks() -> Any:
    wrong = dict.fromkeys(("only_first", "only_second", "items_for_a_point"), int | None)
    results = fields(tasks=dict[str, dict[str, fields(**ITEM_GAP, **wrong)]], average=fields(**GAP))
    return record({"first": str, "second": str}, results)


def _long_context() -> Any:
    scores = dict.fromkeys(("exact", "choice"), fields(mean=float, standard_error=float | None))
    cell = fields(task=str, tokens=int, depth=float | None, chance=float, cache_bytes=float, items=(int, 0), **scores)
    stretch = fields(start=int, stop=int, perplexity=float, standard_error=float)
    results = fields(cells=list[cell], positions=(list[stretch] | None, None))
    scored = fields(exact=Scores, choice=Scores, logprob=Scores)
    by_length = dict[str, scored]

    class Samples(BaseModel):
        """Scores of every prompt: task -> length -> score."""

        model_config = ConfigDict(strict=True, extra="allow")
        __pydantic_extra__: dict[str, by_length]  # pyright: ignore[reportInvalidTypeForm]
        position: Any = None

    whole = record({"cache_bits": (int | None, None)}, results, Samples)
    return Annotated[whole, AfterValidator(_cells_of_samples)]


def _paired_long_context() -> Any:
    score = Literal["exact", "choice", "logprob"]
    length, stretch = fields(task=str, score=score, tokens=int, **ITEM_GAP), fields(stop=int, items=int, **GAP)
    results = fields(lengths=list[length], tasks=dict[str, dict[score, fields(**GAP)]], positions=list[stretch])
    return record({"first": str, "second": str}, results)


SCHEMAS: dict[str, TypeAdapter[Any]] = {
    kind: TypeAdapter(schema)
    for kind, schema in {
        "pretraining": _runs(),
        "fit": _fits(),
        "comparison": _comparisons(),
        "compression": _compressions(),
        "recovery": _recoveries(),
        "perplexity": _perplexities(),
        "profile": _profiles(),
        "task": _tasks(),
        "paired tasks": _paired_tasks(),
        "long context": _long_context(),
        "paired long context": _paired_long_context(),
    }.items()
}


def check_fields(record: Record, where: str) -> None:
    """Check the fields that the section of this kind reads; a kind without a section has none.

    Raises
    ------
    ValueError
        A field is missing or of another type; the message starts with `where` and names the field.
    """
    if record["kind"] not in SCHEMAS:
        return
    try:
        SCHEMAS[record["kind"]].validate_python(record)
    except ValidationError as error:
        first, *others = error.errors(include_url=False, include_input=False)
        field, message = ".".join(map(str, first["loc"])), first["msg"]
        more = f" (and {len(others)} more)" if others else ""
        raise ValueError(f"{where}: {field}: {message[0].lower()}{message[1:]}{more}") from error
