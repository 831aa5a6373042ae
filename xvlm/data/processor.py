"""From images and texts to tensors: size, normalisation and tokenizer, saved and loaded with the weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from PIL import Image
from pydantic import BeforeValidator, Field
from torch import Tensor

from xvlm import hub
from xvlm.config import Configured, load_config
from xvlm.data.words import clean_caption
from xvlm.types import Texts

if TYPE_CHECKING:  # takes seconds to import
    from transformers import PreTrainedTokenizerFast

FILE = "processor.json"

Pixels = Annotated[int, Field(gt=0)]
Channels = tuple[float, float, float]


def _square(size: Any) -> Any:
    return (size, size) if isinstance(size, int) else size


class ProcessorConfig(Configured):
    """Mean and standard deviation are of RGB in [0, 1]; CLIP's, which X-VLM uses with every trunk."""

    image_size: Annotated[tuple[Pixels, Pixels], BeforeValidator(_square)] = (224, 224)  # height, width; one: square
    mean: Channels = (0.48145466, 0.4578275, 0.40821073)
    std: Channels = (0.26862954, 0.26130258, 0.27577711)
    interpolation: Literal["bicubic", "bilinear", "lanczos"] = "bicubic"
    max_tokens: Annotated[int, Field(ge=2)] = 40  # [CLS] and [SEP] included
    max_words: Annotated[int, Field(ge=1)] = 40
    end_token: bool = False  # [SEP] after the text; X-VLM is pre-trained without

    @property
    def resampling(self) -> Image.Resampling:
        return Image.Resampling[self.interpolation.upper()]


class Processor:
    """Prepares images and texts for a model, always in the same way.

    Args:
        tokenizer: of the transformers library, one that runs on ``tokenizers`` ("fast") and has [CLS], [MASK] and
            padding tokens, by whatever name.

    Raises:
        ValueError: it is not fast, or has not those tokens.
    """

    def __init__(self, config: ProcessorConfig, tokenizer: "PreTrainedTokenizerFast"):
        wanted = ["cls_token_id", "mask_token_id", "pad_token_id"] + ["sep_token_id"] * config.end_token
        if missing := [name for name in wanted if getattr(tokenizer, name) is None]:
            raise ValueError(f"the tokenizer {tokenizer.name_or_path!r} has no {', '.join(missing)}")
        if not tokenizer.is_fast:
            raise ValueError(
                f"the tokenizer {tokenizer.name_or_path!r} is a slow one; expected one with a tokenizer.json"
            )
        self.config = config
        self.tokenizer = tokenizer
        self.vocab_size = len(tokenizer)
        self.mask_id: int = tokenizer.mask_token_id
        self.pad_id: int = tokenizer.pad_token_id
        self._split = tokenizer.backend_tokenizer
        self._split.no_truncation()  # tokenizer files may say otherwise, and would cut what is ours to cut
        self._split.no_padding()

    @classmethod
    def from_vocabulary(cls, lines: Sequence[str], config: ProcessorConfig) -> "Processor":
        """A lower-casing BERT tokenizer of these word pieces; their order gives the ids.

        Raises:
            ValueError: a special token is missing or a piece occurs twice.
        """
        from transformers import BertTokenizer

        vocabulary = {piece: i for i, piece in enumerate(lines)}
        if missing := {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"} - vocabulary.keys():
            raise ValueError(f"the vocabulary of {len(lines)} pieces has no {', '.join(sorted(missing))}")
        if len(vocabulary) < len(lines):
            twice = next(piece for i, piece in enumerate(lines) if vocabulary[piece] != i)
            raise ValueError(f"the vocabulary has {twice!r} more than once")
        return cls(config, BertTokenizer(vocab=vocabulary))

    @classmethod
    def from_tokenizer(cls, folder: Path | str, config: ProcessorConfig) -> "Processor":
        """The tokenizer of a local folder, of any family: ``tokenizer_config.json`` and the files it goes with. BERT's
        ``tokenizer.json`` or ``vocab.txt`` will do alone.

        Raises:
            FileNotFoundError: none of them is there.
            ValueError: what is there does not make a tokenizer, or one that lacks special tokens.
        """
        from transformers import AutoTokenizer, BertTokenizer

        folder = Path(folder)
        if not any((folder / name).exists() for name in ("tokenizer_config.json", "tokenizer.json", "vocab.txt")):
            raise FileNotFoundError(
                f"{folder}: expected a tokenizer_config.json, a tokenizer.json or a vocab.txt, found none of them"
            )
        # Without its configuration a tokenizer file does not say which tokens are special; BERT's names are known.
        kind = AutoTokenizer if (folder / "tokenizer_config.json").exists() else BertTokenizer
        try:
            tokenizer = kind.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # the library raises whatever the files make it trip over
            raise ValueError(f"{folder}: no tokenizer can be made of its files ({kind.__name__}): {error}") from None
        if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what is made where the vocabulary is missing
            raise ValueError(f"{folder}: its tokenizer knows no words but {tokenizer.all_special_tokens}")
        return cls(config, tokenizer)

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> "Processor":
        """What :meth:`save_pretrained` wrote, by path, shipped name or hub name (see :func:`xvlm.hub.locate`).

        Raises:
            ConfigError: no ``processor.json``, or one with unknown or wrong fields.
            FileNotFoundError: no tokenizer beside it.
        """
        folder = hub.locate(folder)
        return cls.from_tokenizer(folder, load_config(ProcessorConfig, folder / FILE))

    def save_pretrained(self, folder: Path | str) -> None:
        """Write ``processor.json`` and the tokenizer's files."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(folder)
        (folder / FILE).write_text(self.config.model_dump_json(indent=2) + "\n", encoding="utf-8")

    def push_to_hub(self, name: str, *, private: bool = False) -> str:
        """Save to the repository ``org/name`` of the hub, beside the model's files; returns its address.

        Raises:
            OSError: the hub refused, with its reason.
        """
        return hub.push_saved(self.save_pretrained, name, private=private)

    def encode(self, text: str) -> tuple[list[int], list[bool]]:
        """Ids of the cleaned text, [CLS] first, at most ``max_tokens``; and which tokens continue a word.

        Raises:
            ValueError: the text has no words once cleaned.
        """
        cleaned = clean_caption(text, self.config.max_words)
        split = self._split.encode(cleaned, add_special_tokens=False)
        words, spans = split.word_ids, split.offsets
        room = self.config.max_tokens - 1 - self.config.end_token
        ids = [self.tokenizer.cls_token_id, *split.ids[:room]]
        continues = [False] * len(ids)
        for i in range(1, len(ids) - 1):
            # Some tokenizers call a whole text one word; a space between two tokens, or before the second, ends it too.
            spaced = " " in cleaned[spans[i - 1][1] : spans[i][0] + 1]
            continues[i + 1] = words[i] == words[i - 1] and not spaced
        if self.config.end_token:
            ids.append(self.tokenizer.sep_token_id)
            continues.append(False)
        return ids, continues

    def has_words(self, text: str) -> bool:
        """Whether anything is left of a text once it is cleaned: only then can it be encoded."""
        try:
            clean_caption(text, self.config.max_words)
        except ValueError:
            return False
        return True

    def fits(self, text: str) -> bool:
        """Whether :meth:`encode` keeps all of a text."""
        config, words = self.config, clean_caption(text, len(text))
        tokens = self._split.encode(words, add_special_tokens=False).ids
        return words.count(" ") < config.max_words and len(tokens) < config.max_tokens - config.end_token

    def texts(self, texts: list[str]) -> Texts:
        """Texts as ids, padded to the longest of them.

        Raises:
            ValueError: no texts, or one without words; names it.
        """
        return self.pad([self.encode(text)[0] for text in texts])

    def pad(self, rows: Sequence[Sequence[int]]) -> Texts:
        """Ids of several texts as one tensor, padded to the longest."""
        if not rows:
            raise ValueError("there are no texts to pad")
        ids = torch.full((len(rows), max(map(len, rows))), self.pad_id)
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        ids[mask] = torch.tensor([i for row in rows for i in row])
        return Texts(ids, mask)

    def resize(self, image: Image.Image) -> Image.Image:
        """The image at ``image_size``, whatever its aspect ratio."""
        height, width = self.config.image_size
        return image.resize((width, height), self.config.resampling)

    def pixel_values(self, image: Image.Image) -> Float[Tensor, "3 height width"]:
        """An RGB image, resized and normalised."""
        return self.normalise([to_tensor(self.resize(image))])[0]

    def normalise(self, images: Sequence[UInt8[Tensor, "3 height width"]]) -> Float[Tensor, "image 3 height width"]:
        """Images of ``image_size`` as a model wants them."""
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.config.mean, self.config.std))
        normalised = torch.empty(len(images), 3, *self.config.image_size)
        for pixels, image in zip(normalised, images, strict=True):  # one by one: an image fits in the cache
            pixels.copy_(image).div_(255).sub_(mean).div_(std)
        return normalised


def to_tensor(image: Image.Image) -> UInt8[Tensor, "3 height width"]:
    """The pixels of an RGB image."""
    return rearrange(torch.from_numpy(np.array(image)), "height width channel -> channel height width")
