"""Models: the compressed attention of existing architectures, one decoder for the whole family, loading, accounting.

Importing this package registers its models with transformers' Auto classes.
"""

from mea.models import decoder, latent_attention

latent_attention.register()
decoder.register()
