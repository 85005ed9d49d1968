"""Can we prove it? Run folders, a hash-chained ledger, and the check of all three."""

from sprat.trust.ledger import Ledger
from sprat.trust.run import Run, open_run
from sprat.trust.verify import Finding

__all__ = ["Finding", "Ledger", "Run", "open_run"]
