"""Long context: is what a model read long ago still there to be used, through the cache that it decodes with?

``needles``, ``tracking``, ``words`` and ``recall`` make prompts of a seed; ``answering`` has a model answer them;
``plan`` says which, ``run`` does it, ``cells`` and ``paired`` sum up.
"""

from mea.evaluate.long_context.paired import compare
from mea.evaluate.long_context.plan import LongContext
from mea.evaluate.long_context.run import evaluate

__all__ = ["LongContext", "compare", "evaluate"]
