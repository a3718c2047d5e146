"""What the tests in tests/vllm share: checkpoints, engines, the oracle, reloads."""
