"""What did each station gain and cost? One self-contained ``report.html``, made from run folders alone."""

from sprat.report.page import write_report

__all__ = ["write_report"]
