"""Which section shows which kinds of records; a new kind is added here and in `mea.report.schema`."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from mea.records import Record
from mea.report.parts import Part, Section
from mea.report.sections import comparison, comparison_rows, long_context, own_model, pretraining, profile, tasks

Build = Callable[[Sequence[Record]], list[Section]]

# In the order of the page: kinds of records, and what makes sections of all records of these kinds.
REGISTRY: list[tuple[tuple[str, ...], Build]] = [
    ((pretraining.RUN, pretraining.FIT), pretraining.sections),
    (own_model.KINDS, own_model.sections),
    ((comparison_rows.KIND,), comparison.sections),
    ((profile.KIND,), profile.sections),
    ((tasks.TASK, tasks.PAIRED), tasks.sections),
    ((long_context.LONG, long_context.PAIRED), long_context.sections),
]
SHOWN = [kind for kinds, _ in REGISTRY for kind in kinds]


def make_sections(records: Sequence[Record]) -> list[Section]:
    """Sections of all records; those of kinds that no section shows are left out.

    Raises
    ------
    ValueError
        No record is of a kind that is shown.
    """
    sections: list[Section] = []
    for kinds, build in REGISTRY:
        chosen = [record for record in records if record["kind"] in kinds]
        if chosen:
            sections += build(chosen)
    if not sections:
        kinds = ", ".join(sorted({record["kind"] for record in records})) or "none"
        raise ValueError(
            f"no record that has a section among {len(records)} (kinds: {kinds}; shown are {', '.join(SHOWN)})"
        )
    return _with_unique_names(sections)


def _with_unique_names(sections: list[Section]) -> list[Section]:
    """Figures that share a name get the number of their section before it: names become names of files."""
    names = Counter(figure.name for section in sections for part in section.parts for figure in part.figures)

    def renamed(number: int, part: Part) -> Part:
        figures = [
            replace(figure, name=f"{number}-{figure.name}") if names[figure.name] > 1 else figure
            for figure in part.figures
        ]
        return replace(part, figures=figures)

    return [
        replace(section, parts=[renamed(number, part) for part in section.parts])
        for number, section in enumerate(sections, 1)
    ]


def not_shown(records: Sequence[Record]) -> dict[str, int]:
    """Numbers of records by kinds that no section shows."""
    return dict(Counter(record["kind"] for record in records if record["kind"] not in SHOWN))
