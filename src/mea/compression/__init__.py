"""Calibrate, factorise, convert, check, save: one factorisation method is one file."""
