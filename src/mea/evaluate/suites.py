"""Suites of tasks with lm-evaluation-harness's names, and the columns of the paper they lack (arXiv 2601.19611)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mea.names import did_you_mean

LONG_CONTEXT = "long-context"  # the one suite that is not the harness's: see mea.evaluate.long_context
ZERO_SHOT = ("piqa", "openbookqa", "winogrande", "hellaswag", "arc_easy", "arc_challenge")


@dataclass(frozen=True)
class Suite:
    """Tasks, the harness's or of ``tasks/`` (``mea_…``), and the paper's columns that none of them measures."""

    name: str
    what: str
    tasks: tuple[str, ...]
    columns: dict[str, str]  # the paper's column -> task
    missing: tuple[str, ...] = ()


SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            "zero-shot",
            "the paper's Table 1: accuracy without examples; the likelier answer counts, not normalised by length",
            ZERO_SHOT,
            dict(
                zip(("PIQA", "OBQA", "WinoGrande", "HellaSwag", "ARC-e", "ARC-c"), ZERO_SHOT, strict=True),
            ),
        ),
        Suite(
            "knowledge",
            "the paper's Table 2, knowledge",
            ("mmlu_pro", "gpqa_diamond_cot_zeroshot", "mea_supergpqa"),
            {"MMLU-Pro": "mmlu_pro", "GPQA-Diamond": "gpqa_diamond_cot_zeroshot", "SuperGPQA": "mea_supergpqa"},
        ),
        Suite(
            "science",
            "the paper's Table 2, science: one of its columns, and tasks of the harness that are near the others",
            ("mea_medxpertqa", "sciq", "medqa_4options", "mmlu_pro_physics", "mmlu_pro_chemistry", "mmlu_pro_biology"),
            {"MedXpertQA": "mea_medxpertqa"},
            ("PHYSICS", "ChemBench", "ClimaQA"),
        ),
        Suite(
            "math",
            "the paper's Table 2, mathematics; beside AIME 2025 two easier tasks, for small models",
            ("aime25", "mea_olympiadbench", "mea_olymmath", "minerva_math500", "gsm8k"),
            {"AIME 2025": "aime25", "OlympiadBench": "mea_olympiadbench", "OlymMATH": "mea_olymmath"},
            ("LiveMathBench-hard",),
        ),
    )
}


def select(suite: str | None, tasks: Sequence[str] = (), known: Iterable[str] = ZERO_SHOT) -> tuple[str, ...]:
    """The tasks of a suite, or those named.

    Raises
    ------
    ValueError
        An unknown suite or task, or neither given.
    """
    suites = (*SUITES, LONG_CONTEXT)
    if suite is not None and suite not in suites:
        raise ValueError(f"no suite named {suite!r}: suites are {', '.join(suites)}{did_you_mean(suite, suites)}")
    known = tuple(known)
    whole = known if suite == LONG_CONTEXT else SUITES[suite].tasks if suite else ()
    chosen = tuple(tasks) or whole
    if not chosen:
        raise ValueError(f"nothing to evaluate: give a suite ({', '.join(suites)}) or tasks")
    names = set(known)
    for task in chosen:
        if task not in names:
            listed = f"tasks are {', '.join(sorted(names))}" if len(names) < 20 else f"{len(names):,} tasks are known"
            raise ValueError(f"no task named {task!r}: {listed}{did_you_mean(task, names)}")
    if len(set(chosen)) != len(chosen):
        raise ValueError(f"a task is named twice: {', '.join(chosen)}")
    return chosen
