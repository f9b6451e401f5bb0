"""The report: one page about many runs, which needs nothing beside itself to be read."""

from pml.report.page import PAGE_NAME, Report, make_report, write_report

__all__ = ["PAGE_NAME", "Report", "make_report", "write_report"]
