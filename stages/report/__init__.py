"""Stage report: the results of a sweep -> report/index.html and tables; and finished runs as Python objects."""

from stages.report.run import as_text, run
from stages.report.runs import Run, Summary, read_run, read_runs, summary

__all__ = ["Run", "Summary", "as_text", "read_run", "read_runs", "run", "summary"]
