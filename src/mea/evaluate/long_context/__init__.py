"""Long context: can a model still use what it read long ago, through the cache that it decodes with?

``needles``, ``tracking``, ``words`` and ``recall`` make prompts from a seed; ``plan`` lists them, ``answering`` has a
model answer them, ``cells`` and ``paired`` summarise the scores, ``run`` is the suite for `mea.evaluate.runner`.
"""

from mea.evaluate.long_context.paired import compare
from mea.evaluate.long_context.run import LongContext

__all__ = ["LongContext", "compare"]
