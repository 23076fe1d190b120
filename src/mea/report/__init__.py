"""Records to tables, figures and one page; reads records only.

`make_sections` builds what records show (`mea.report.registry` says which kinds), `write_report` makes a page of it,
`write_markdown` and `as_csv` the same for a README and for a spreadsheet. Every section is made of the parts in
`mea.report.parts`; `TerminalTable` prints the table of one.
"""

from mea.report.registry import make_sections
from mea.report.render.html import write_report
from mea.report.render.markdown import as_csv, write_markdown, write_text
from mea.report.render.terminal import TerminalTable
from mea.report.sections.comparison_rows import Row, rows, terminal_table
from mea.report.sources import find_records

__all__ = [
    "Row",
    "TerminalTable",
    "as_csv",
    "find_records",
    "make_sections",
    "rows",
    "terminal_table",
    "write_markdown",
    "write_report",
    "write_text",
]
