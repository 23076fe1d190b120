"""Transform coding of the KV cache: components of keys and values, each with its own number of bits."""
