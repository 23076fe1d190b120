"""What the methods see of a model: calibration text, layer by layer, as second moments."""
