"""What do we learn from: read, dedup, split, pack, load. Import the parts by their module."""
