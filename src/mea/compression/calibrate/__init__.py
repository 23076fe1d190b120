"""Calibration: run text through the model layer by layer and collect second moments for the methods."""
