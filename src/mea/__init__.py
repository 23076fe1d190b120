"""Multi-head explicit attention (MEA): smaller KV caches for existing models, and attention whose heads interact.

Importing the package registers its models with transformers' Auto classes. It imports neither transformers nor torch:
that is left to the first use.
"""

from typing import TYPE_CHECKING, Any

import mea.models  # noqa: F401, registers the models

if TYPE_CHECKING:
    from mea.compression import Calibration, compress

__version__ = "0.1.0"
__all__ = ["Calibration", "compress"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'mea' has no attribute {name!r}")
    from mea import compression

    return getattr(compression, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
