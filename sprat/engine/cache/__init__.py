"""The paged KV cache: blocks and their tables, the keys by which a prefix is found, and the tier on disk."""
