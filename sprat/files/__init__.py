"""What is on disk? Atomic writes, digests, locks and JSON, each in one place."""
