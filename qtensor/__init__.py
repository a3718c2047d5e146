"""qtensor."""
