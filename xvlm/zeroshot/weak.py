"""Weakly supervised grounding: learn which expressions belong to which images, without a box; Grad-CAM finds them."""

from typing import Literal

from xvlm.config import Configured
from xvlm.models.xvlm import XVLM
from xvlm.tasks.retrieval import HEADS as HEADS
from xvlm.tasks.retrieval import RetrievalConfig
from xvlm.tasks.retrieval import Task as Retrieval
from xvlm.zeroshot.gradcam import GradCAM, GradCAMConfig


class WeakGroundingConfig(Configured):
    """Weights of retrieval's losses, and how boxes are found."""

    name: Literal["weak_grounding"] = "weak_grounding"
    itc: float = 1.0
    itm: float = 1.0
    gradcam: GradCAMConfig = GradCAMConfig()


class Task(Retrieval):
    """X-VLM's weakly supervised grounding (section 4.2; reference ``Grounding.py``).

    The losses are those of retrieval: texts are expressions, those about one image are right answers to each other.
    """

    def __init__(self, config: WeakGroundingConfig, model: XVLM):
        super().__init__(RetrievalConfig(itc=config.itc, itm=config.itm), model)
        self.gradcam = config.gradcam

    def method(self, layer: int | None = None) -> GradCAM:
        """How it is asked for boxes; ``layer`` where the configuration names none."""
        chosen = self.gradcam if self.gradcam.layer is not None else self.gradcam.model_copy(update={"layer": layer})
        return GradCAM(chosen, self.model)
