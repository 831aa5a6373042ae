"""Models that write: a causal BERT stack that looks at concepts, for captions and for answers.

A captioner looks at an image or a region. An answerer reads a question over it first and looks at the question's words,
which then are the concept: [CLS] in the place of the pooled token, the other words in the place of patches (X-VLM,
``models/model_generation.py`` and ``models/model_vqa.py``).
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from xvlm.config import Configured
from xvlm.models import convert, golden
from xvlm.models.packing import Page
from xvlm.models.text import Count, CrossEncoder, TextConfig, TextEncoder, View
from xvlm.models.vision import VisionConfig, VisionEncoder
from xvlm.models.xvlm import XVLM, Pretrained, WordHead, initialise_like_bert, load_strictly
from xvlm.types import Concepts, Regions, Texts, Words


class Decoder(nn.Module):
    """Guesses the next word from the words before it and a concept."""

    def __init__(self, config: TextConfig, concept_dim: int):
        super().__init__()
        self.text = TextEncoder(config, causal=True)
        self.cross = CrossEncoder(config, concept_dim, causal=True)
        self.word_head = WordHead(config)
        self.apply(initialise_like_bert)

    def forward(
        self,
        texts: Texts,
        concepts: Concepts,
        about: Int[Tensor, "question"],
        of: Int[Tensor, "question"] | None = None,
        only: Bool[Tensor, "question word"] | None = None,
    ) -> Float[Tensor, "token vocabulary"]:
        """Logits of the word after each word asked for; the arguments are those of :meth:`xvlm.XVLM.fuse`."""
        fused = self.cross(self.text(texts), concepts, about, of, only)
        return self.word_head(fused.states, self.text.words.weight)


class Writing:
    """Texts that grow by a word per call, all of one length (a :data:`xvlm.models.generation.NextWord`).

    What each layer was given is kept, and the concepts are projected once, so that a call computes new words only.
    """

    def __init__(self, decoder: Decoder, concepts: Concepts, about: Int[Tensor, "row"]):
        self.decoder, self.concepts, self.about = decoder, concepts, about
        self.layers = [*decoder.text.layers, *decoder.cross.layers]
        seeing = [layer.cross_attention for layer in self.layers]
        self.keys = [None if each is None else each.project(concepts) for each in seeing]
        self.inputs = [
            torch.zeros(len(about), 0, layer.norm.bias.numel(), device=about.device) for layer in self.layers
        ]

    def __call__(self, ids: Int[Tensor, "row word"], continued: Int[Tensor, "row"]) -> Float[Tensor, "row vocabulary"]:
        new = torch.ones_like(ids, dtype=torch.bool)
        page = Page.of(new, causal=True)
        new[:, : self.inputs[0].shape[1]] = False
        asking = page.part(new)
        view = View.of(self.concepts, self.about[asking.sequence])
        x = self.decoder.text.embed(Texts(ids, torch.ones_like(new)), new)
        for number, layer in enumerate(self.layers):
            inputs = torch.cat([self.inputs[number][continued], x.unflatten(0, (len(ids), -1))], 1)
            self.inputs[number] = inputs
            x = layer.attention(x, asking, inputs.flatten(0, 1), page)
            if layer.cross_attention is not None:
                x = layer.cross_attention(x, view, self.keys[number])
            x = layer.feed_forward(x)
        last = x.unflatten(0, (len(ids), -1))[:, -1]
        return self.decoder.word_head(last, self.decoder.text.words.weight)


def next_words(texts: Texts, given: int = 1) -> tuple[Bool[Tensor, "text word"], Int[Tensor, "token"]]:
    """The words after which another one has to be guessed, and those others; the first ``given`` are no guesses."""
    only = torch.zeros_like(texts.mask)
    only[:, given - 1 : -1] = texts.mask[:, given:]
    return only, texts.ids[:, given:][texts.mask[:, given:]]


class CaptionerConfig(Configured):
    vision: VisionConfig = VisionConfig()
    text: TextConfig = TextConfig()


class Captioner(Pretrained):
    """Says what is in an image or a region: X-VLM's text and cross encoder run causally."""

    Config = CaptionerConfig

    def __init__(self, config: CaptionerConfig):
        super().__init__()
        self.config = config
        self.vision = VisionEncoder(config.vision)
        self.decoder = Decoder(config.text, self.vision.dim)

    @classmethod
    def of(cls, model: XVLM) -> "Captioner":
        """A captioner that starts with all a pre-trained model knows."""
        made = cls(CaptionerConfig(vision=model.config.vision, text=model.config.text))
        load_strictly(made, convert.for_captions(model.state_dict()), "the pre-trained model")
        return made

    def answers(
        self, images: Float[Tensor, "image 3 height width"], regions: Regions, texts: Texts
    ) -> dict[str, Tensor]:
        about = len(images) + torch.arange(len(texts.ids))
        return {"words": golden.sample(self.decoder(texts, self.vision(images, regions), about))}


class AnswererConfig(Configured):
    vision: VisionConfig = VisionConfig()
    text: TextConfig = TextConfig()
    decoder_layers: Count = 6


class Answerer(Pretrained):
    """Answers questions about images or regions: X-VLM reads the question, a decoder writes the answer."""

    Config = AnswererConfig

    def __init__(self, config: AnswererConfig):
        super().__init__()
        self.config = config
        self.vision = VisionEncoder(config.vision)
        self.text = TextEncoder(config.text)
        self.cross = CrossEncoder(config.text, self.vision.dim)
        for part in (self.text, self.cross):
            part.apply(initialise_like_bert)
        all_looking = config.text.model_copy(update={"text_layers": 0, "cross_layers": config.decoder_layers})
        self.decoder = Decoder(all_looking, config.text.dim)

    @classmethod
    def of(cls, model: XVLM, decoder_layers: int = 6) -> "Answerer":
        """An answerer that starts with all a pre-trained model knows; the decoder's layers are its cross encoder's.

        Keys and values of the decoder's cross-attention start fresh unless words are as wide as patches.
        """
        config = AnswererConfig(vision=model.config.vision, text=model.config.text, decoder_layers=decoder_layers)
        made = cls(config)
        same_width = model.vision.dim == config.text.dim
        known = convert.for_answers(model.state_dict(), decoder_layers, same_width=same_width)
        load_strictly(made, made.state_dict() | known, "the pre-trained model")
        return made

    def read(
        self, images: Float[Tensor, "image 3 height width"], questions: Texts, regions: Regions
    ) -> tuple[Words, Concepts]:
        """States of the questions' words after looking at what each is about; and these as concepts for the decoder."""
        about = len(images) + torch.arange(len(questions.ids), device=images.device)
        states = self.cross(self.text(questions), self.vision(images, regions), about)
        return states, as_concepts(states)

    def answers(
        self, images: Float[Tensor, "image 3 height width"], regions: Regions, texts: Texts
    ) -> dict[str, Tensor]:
        states, questions = self.read(images, texts, regions)
        logits = self.decoder(texts, questions, torch.arange(len(texts.ids)))
        return {"read": states.first, "words": golden.sample(logits)}


def as_concepts(words: Words) -> Concepts:
    """Texts as something to look at: one concept each, its first word pooled, the others patches."""
    others = words.mask[:, 1:]
    row = torch.arange(len(others), device=others.device)
    return Concepts(words.padded()[:, 1:], words.first, row, others, (1, others.shape[1]))
