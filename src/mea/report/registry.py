"""Which section shows which kinds of records; a new kind takes its place here."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from mea.records import Record
from mea.report.parts import Part, Section
from mea.report.sections import comparison, comparison_rows, long_context, pretraining, profile, tasks

Build = Callable[[Sequence[Record]], list[Section]]

# In the order of the page: kinds of records, and what makes sections of all records of these kinds.
REGISTRY: list[tuple[tuple[str, ...], Build]] = [
    ((pretraining.RUN, pretraining.FIT), pretraining.sections),
    ((comparison_rows.KIND,), comparison.sections),
    ((profile.KIND,), profile.sections),
    ((tasks.TASK, tasks.PAIRED), tasks.sections),
    ((long_context.LONG, long_context.PAIRED), long_context.sections),
]


def make_sections(records: Sequence[Record]) -> list[Section]:
    """Sections for the records that there are; records of kinds that no section shows are left out.

    Raises
    ------
    ValueError
        No record is of a kind that is shown.
    """
    found: list[Section] = []
    for kinds, build in REGISTRY:
        chosen = [record for record in records if record["kind"] in kinds]
        if chosen:
            found += build(chosen)
    if not found:
        kinds = ", ".join(sorted({record["kind"] for record in records})) or "none"
        known = ", ".join(kind for shown, _ in REGISTRY for kind in shown)
        raise ValueError(f"no record that has a section among {len(records)} (kinds: {kinds}; shown are {known})")
    return _with_own_names(found)


def _with_own_names(found: list[Section]) -> list[Section]:
    """Figures that share a name get the number of their section before it: names become names of files."""
    names = [figure.name for section in found for part in section.parts for figure in part.figures]
    shared = {name for name in names if names.count(name) > 1}

    def renamed(number: int, part: Part) -> Part:
        figures = [
            replace(figure, name=f"{number}-{figure.name}") if figure.name in shared else figure
            for figure in part.figures
        ]
        return replace(part, figures=figures)

    return [
        replace(section, parts=[renamed(number, part) for part in section.parts])
        for number, section in enumerate(found, 1)
    ]


def not_shown(records: Sequence[Record]) -> dict[str, int]:
    """Numbers of records by kinds that no section shows."""
    shown = {kind for kinds, _ in REGISTRY for kind in kinds}
    kinds = [record["kind"] for record in records if record["kind"] not in shown]
    return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
