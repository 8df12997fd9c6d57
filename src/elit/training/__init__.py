"""One training run: its loop, and what it keeps and tells."""
