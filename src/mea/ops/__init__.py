"""Tensors in, tensors out: no modules, no Hugging Face. Start at ``reference.py``."""
