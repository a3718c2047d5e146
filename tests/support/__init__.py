"""What tests of several files share: models, oracles, faults, processes. `support.vllm` is the same for tests/vllm."""
