"""Models: the compressed attention of existing architectures, one decoder for the whole family, loading, accounting.

Importing this package registers its models with transformers' Auto classes, and imports neither transformers nor torch
to do so.
"""

from mea.models import registration

registration.install()
