"""Multi-head explicit attention (MEA): smaller KV caches for existing models, and attention whose heads interact."""

__version__ = "0.1.0"
