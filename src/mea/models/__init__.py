"""Compressed attention for existing architectures, loading, and the accounting of parameters and cache bytes."""
