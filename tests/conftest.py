"""Test settings: a deterministic hypothesis profile; HYPOTHESIS_PROFILE=thorough searches longer, at random."""

import os

from hypothesis import settings

settings.register_profile("default", max_examples=60, derandomize=True, deadline=None, print_blob=True)
settings.register_profile("thorough", max_examples=1000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
