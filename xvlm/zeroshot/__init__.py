"""Ways of grounding that were not trained on boxes: each a :class:`xvlm.grounder.Method`, or leads to one."""

from xvlm.zeroshot import gradcam, weak

__all__ = ["gradcam", "weak"]
