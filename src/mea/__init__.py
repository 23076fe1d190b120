"""Multi-head explicit attention (MEA): smaller KV caches for existing models, and attention whose heads interact.

Importing the package registers its models with transformers' Auto classes.
"""

from mea.compression import Calibration, compress

__version__ = "0.1.0"
__all__ = ["Calibration", "compress"]
