"""A stand-in for diffusers, for where it is not installed: the steps of its from_pretrained and save_pretrained that a
quantizer is asked in, in their order, as of diffusers 0.42. tests/libraries has the same with diffusers itself."""
