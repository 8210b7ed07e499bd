"""The report of a comparison: one page of HTML, made of the tables and of what the runs noted."""

from fedpace.simulations.comparison.report.page import write_report

__all__ = ["write_report"]
