"""What was found out about a file of weights and is kept beside it, as JSON: not read once the weights are others."""

from pathlib import Path
from typing import ClassVar, TypeVar

from xvlm import hub
from xvlm.config import Configured, load_config
from xvlm.models.golden import WEIGHTS

Kept = TypeVar("Kept", bound="Attached")


class Attached(Configured):
    """A finding that holds for some weights alone."""

    FILE: ClassVar[str]
    weights: str = ""  # SHA-256 of their file; save_pretrained fills it in

    @classmethod
    def from_pretrained(cls: type[Kept], folder: Path) -> Kept | None:
        """What is stored beside the weights of a folder; None where nothing is.

        Raises:
            ConfigError: the file holds something else.
            ValueError: it is about other weights than those that lie there now.
        """
        file = folder / cls.FILE
        if not file.exists():
            return None
        found = load_config(cls, file)
        if found.weights != hub.sha256(folder / WEIGHTS):
            raise ValueError(f"{file}: is about other weights than {WEIGHTS} beside it; make it anew, or delete it")
        return found

    def save_pretrained(self, folder: Path) -> None:
        """Write it beside the weights that lie in the folder; from then on it is about these."""
        about = self.model_copy(update={"weights": hub.sha256(folder / WEIGHTS)})
        hub.write_atomically(folder / self.FILE, about.model_dump_json(indent=2) + "\n")
