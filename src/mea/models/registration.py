"""Register this package's models with transformers' Auto classes, without importing transformers or torch.

transformers looks classes up in two mappings: from a model type to a configuration class, and from that to a model
class. Each keeps classes that were registered from outside in a dictionary. Here that dictionary is replaced by one
that imports this package's model files when one of their keys is looked up. The modules of the mappings may not have
been imported yet: then an import hook does the same after they have been executed.

Importing the model files at that moment would be too early. ``transformers.modeling_utils`` and the files of the stock
models import these modules half way through their own import, and the model files need them whole.
"""

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PACKAGE = "transformers.models.auto"
MAPPINGS = {
    f"{PACKAGE}.configuration_auto": "CONFIG_MAPPING",
    f"{PACKAGE}.modeling_auto": "MODEL_FOR_CAUSAL_LM_MAPPING",
}


class DeferredEntries(dict):
    """Entries of other packages, and this package's entries, which are created when one is first looked up.

    Listing the entries imports nothing: own entries are listed after the first look-up of one of them.
    """

    def __contains__(self, key: object) -> bool:
        if not super().__contains__(key) and _is_own(key):
            register_models()
        return super().__contains__(key)

    def __missing__(self, key: object) -> Any:
        if key in self:
            return self[key]
        raise KeyError(key)


class MappingFinder(MetaPathFinder):
    """Finds the mappings' modules with the other finders, and prepares the mappings after their execution."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname not in MAPPINGS:
            return None
        others = [finder for finder in sys.meta_path if not isinstance(finder, MappingFinder)]
        for find in (getattr(finder, "find_spec", None) for finder in others):
            if find and (spec := find(fullname, path, target)) is not None:
                if spec.loader is not None:
                    spec.loader = MappingLoader(spec.loader)
                return spec
        return None


class MappingLoader(Loader):
    """Runs the original loader, then one further step. The module keeps the original loader."""

    def __init__(self, loader: Any):
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        module.__loader__ = self.loader
        self.loader.exec_module(module)
        defer(module)


def install() -> None:
    """Prepare the mappings that are imported already, and others when they are imported."""
    if not any(isinstance(finder, MappingFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, MappingFinder())
    for name in MAPPINGS:
        if name in sys.modules:
            defer(import_module(name))  # waits where another thread is still executing it


def defer(module: ModuleType) -> None:
    """Make a module's mapping import this package's classes on look-up."""
    mapping = getattr(module, MAPPINGS[module.__name__])
    if not isinstance(mapping._extra_content, DeferredEntries):
        mapping._extra_content = DeferredEntries(mapping._extra_content)


def register_models() -> None:
    """Import the model files and register their classes with the Auto classes."""
    from mea.models import decoder, latent_attention

    latent_attention.register()
    decoder.register()


def _is_own(key: object) -> bool:
    """Whether this package defines that model type, or that configuration class."""
    if isinstance(key, str):
        return key == "mea" or key.startswith("mea_")
    return str(getattr(key, "__module__", "")).startswith("mea.models.")
