"""Ways of grounding that were not trained to: each a :class:`xvlm.grounder.Method`."""

from xvlm.zeroshot import gradcam

__all__ = ["gradcam"]
