"""What did a run, or each station of a road, gain and cost? One self-contained ``report.html``, from folders alone."""

from sprat.report.page import write_report

__all__ = ["write_report"]
