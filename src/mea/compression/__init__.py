"""Compress the KV cache of existing models: calibrate, factorise, convert, check, save."""

from mea.compression.api import compress
from mea.compression.calibrate.text import Calibration
from mea.compression.convert import ConversionError
from mea.compression.options import CompressOptions, Refinement
from mea.compression.result import Compressed
from mea.compression.save import compress_to_folder, preview

__all__ = [
    "Calibration",
    "CompressOptions",
    "Compressed",
    "ConversionError",
    "Refinement",
    "compress",
    "compress_to_folder",
    "preview",
]
