"""Several ranks that hold parts of one model: scales they agree on, one decision for all, and `fully_shard`."""
