"""Multi-grained vision-language pre-training: one model that understands any box in an image."""

__version__ = "0.1.0"
