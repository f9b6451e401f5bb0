"""The report: one self-contained page about many runs."""

from pml.report.page import PAGE_NAME, Report, make_report, write_report

__all__ = ["PAGE_NAME", "Report", "make_report", "write_report"]
