"""Methods side by side on one model at equal cache bytes, this package's and others'."""
