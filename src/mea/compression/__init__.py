"""Compress the KV cache of existing models: calibrate, factorise, convert, check, save."""

from mea.compression.check import ConversionError
from mea.compression.compress import Compressed, compress, compress_to_folder, preview
from mea.compression.plan import Calibration

__all__ = ["Calibration", "Compressed", "ConversionError", "compress", "compress_to_folder", "preview"]
