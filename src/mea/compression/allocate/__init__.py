"""Allocate ranks to layers by what they cost on held-out text, and profile single layers."""
