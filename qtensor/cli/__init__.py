"""The `qtensor` command, one file per group of its commands."""
