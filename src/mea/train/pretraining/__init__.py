"""Pretraining of the family: data, one run, sweeps of runs, what is watched on the way."""
