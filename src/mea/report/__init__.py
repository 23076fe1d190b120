"""Records to tables, figures and one page; reads records only.

`terminal_table` and `write_report` show records of the kind ``"comparison"``: one record is one model as it was
measured, uncompressed (``config["method"] == "none"``) or compressed. `mea.report.rows` says which fields they read.
"""

from mea.report.page import write_report
from mea.report.rows import Row, rows, terminal_table

__all__ = ["Row", "rows", "terminal_table", "write_report"]
