"""Tasks of lm-evaluation-harness, run and scored on this package's models."""
