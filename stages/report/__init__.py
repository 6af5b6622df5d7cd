"""Stage report: results of the sweep -> report/index.html and the tables beside it."""

from stages.report.run import run

__all__ = ["run"]
