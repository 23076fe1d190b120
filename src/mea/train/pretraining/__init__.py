"""Pretraining of the attention family: data, single runs, sweeps, diagnostics."""
