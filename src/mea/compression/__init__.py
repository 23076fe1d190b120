"""Compress the KV cache of existing models: calibrate, factorise, convert, check, save."""

from mea.compression.check import ConversionError
from mea.compression.compress import Compressed, compress
from mea.compression.folder import compress_to_folder, preview
from mea.compression.plan import Allocation, Calibration, allocation

__all__ = [
    "Allocation",
    "Calibration",
    "Compressed",
    "ConversionError",
    "allocation",
    "compress",
    "compress_to_folder",
    "preview",
]
