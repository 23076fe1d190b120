"""Perplexity, also by position, and generation speed."""
