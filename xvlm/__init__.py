"""Multi-grained vision-language pre-training: one model that understands any box in an image."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Loaded when first used: importing torch, timm and transformers takes seconds, `xvlm --help` should not.
_PUBLIC = {
    "XVLM": "xvlm.models.xvlm",
    "XVLMConfig": "xvlm.models.xvlm",
    "Processor": "xvlm.data.processor",
    "Batch": "xvlm.types",
    "Grounded": "xvlm.types",
    "Grounder": "xvlm.grounder",
    "load_config": "xvlm.config",
    "fit": "xvlm.train",
    "draw": "xvlm.viz",
}
_MODULES = ("boxes", "embed", "evaluate", "losses", "metrics", "tasks")

__all__ = ["__version__", *_PUBLIC, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    if name in _MODULES:
        return import_module(f"xvlm.{name}")
    raise AttributeError(f"module 'xvlm' has no attribute {name!r}; public: {', '.join(__all__)}")
