"""The course of a load or reload: `online_quant` and `online_reload`, from the first weight to the last."""
