"""What a weight becomes: schemes by name, how a user writes them, and which weight gets which."""
