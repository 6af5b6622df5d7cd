"""Stage report: results of the sweep -> report/index.html and the tables beside it."""

from stages.report.run import as_text, run

__all__ = ["as_text", "run"]
