"""The text encoder and the cross encoder: the lower and the upper half of a BERT stack, on packed words.

Words of all texts lie one after another without padding; only attention works on padded groups: self-attention groups
words by text, cross-attention by image, because it does not care where a text ends. So the keys and values of an
image's patches are projected once and never copied, however many texts look at it (X-VLM, arXiv 2111.08276,
section 3.2; reference ``models/xbert.py``).
"""

from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from xvlm.config import Configured
from xvlm.models.packing import Packing, Page
from xvlm.types import Concepts, Texts, Words

Count = Annotated[int, Field(ge=1)]


class TextConfig(Configured):
    """Shape of the BERT stack; the defaults are bert-base-uncased as X-VLM uses it.

    roberta-base: ``vocab_size: 50265, max_positions: 514, position_offset: 2, token_types: 1, norm_eps: 1e-5``.
    """

    vocab_size: Count = 30522
    dim: Count = 768
    heads: Count = 12
    feed_forward: Count = 3072
    text_layers: Count = 6  # the text encoder
    cross_layers: Count = 6  # the cross encoder: these also look at the image
    looks: Count = 1  # concepts a text looks at in turn, with a copy of each cross layer for each
    max_positions: Count = 512  # rows of the position table
    position_offset: Annotated[int, Field(ge=0)] = 0  # row of the first word; RoBERTa leaves those up to its padding id
    token_types: Count = 2
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    norm_eps: float = 1e-12

    @model_validator(mode="after")
    def heads_divide_the_width(self) -> "TextConfig":
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} cannot be divided among {self.heads} heads")
        return self


class Attention(nn.Module):
    """BERT's multi-head attention: projections, output, residual and LayerNorm (post-norm)."""

    def __init__(self, config: TextConfig, key_dim: int):
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.scale = (config.dim // config.heads) ** -0.5
        self.query = nn.Linear(config.dim, config.dim)
        self.key = nn.Linear(key_dim, config.dim)
        self.value = nn.Linear(key_dim, config.dim)
        self.out = nn.Linear(config.dim, config.dim)
        self.norm = nn.LayerNorm(config.dim, eps=config.norm_eps)

    def split(self, x: Float[Tensor, "group n dim"]) -> Float[Tensor, "group head n d"]:
        return rearrange(x, "group n (head d) -> group head n d", head=self.heads)

    def probabilities(self, scores: Float[Tensor, "group head slot key"], visible: Bool[Tensor, "..."]) -> Tensor:
        # Written out instead of the fused kernel: on CPU it is several times faster on short texts.
        scores = (scores * self.scale).masked_fill(~visible, torch.finfo(scores.dtype).min)
        return F.dropout(scores.softmax(-1), self.dropout, self.training)

    def finish(self, x: Float[Tensor, "token dim"], mixed: Float[Tensor, "token dim"]) -> Float[Tensor, "token dim"]:
        return self.norm(x + F.dropout(self.out(mixed), self.dropout, self.training))


class SelfAttention(Attention):
    def __init__(self, config: TextConfig):
        super().__init__(config, config.dim)

    def forward(
        self, asking: Float[Tensor, "asking dim"], asked_from: Page, x: Float[Tensor, "token dim"], page: Page
    ) -> Float[Tensor, "asking dim"]:
        """``asking`` tokens, all of ``x`` or some of them, attend to the words of their own text."""
        q = self.split(asked_from.packing.pad(self.query(asking)))
        k, v = (self.split(page.packing.pad(f(x))) for f in (self.key, self.value))
        mixed = self.probabilities(q @ k.transpose(-1, -2), asked_from.sees(page)[:, None]) @ v
        return self.finish(
            asking, asked_from.packing.pack(rearrange(mixed, "group head slot d -> group slot (head d)"))
        )


@dataclass(frozen=True)
class View:
    """What each token looks at: its concept's pooled token and the visible patches of that concept's row."""

    concepts: Concepts
    concept: Int[Tensor, "token"]
    packing: Packing  # tokens by row of patches

    @classmethod
    def of(cls, concepts: Concepts, concept: Int[Tensor, "token"]) -> "View":
        return cls(concepts, concept, Packing.by(concepts.row[concept], len(concepts.patches)))


class Keys(NamedTuple):
    """Keys and values of concepts for one cross layer: of their pooled tokens, and of the patches by head."""

    pooled_k: Float[Tensor, "concept dim"]
    pooled_v: Float[Tensor, "concept dim"]
    patch_k: Float[Tensor, "row head patch d"]
    patch_v: Float[Tensor, "row head patch d"]


class CrossAttention(Attention):
    map: Tensor | None = None

    def take_map(self) -> Float[Tensor, "token head key"]:
        """The probabilities that a call with ``keep_map`` kept, once; they hold a graph, so they should not stay."""
        kept, self.map = self.map, None
        return kept

    def project(self, concepts: Concepts) -> Keys:
        """Done once per layer, whoever looks."""
        pooled_k, pooled_v = (f(concepts.pooled) for f in (self.key, self.value))
        patch_k, patch_v = (self.split(f(concepts.patches)) for f in (self.key, self.value))
        return Keys(pooled_k, pooled_v, patch_k, patch_v)

    def forward(
        self, x: Float[Tensor, "token dim"], view: View, keys: Keys, *, keep_map: bool = False
    ) -> Float[Tensor, "token dim"]:
        """Tokens attend to ``[pooled, visible patches]`` of their concept.

        After a call with ``keep_map`` the probabilities, (token, head, 1 + patch) with gradient, wait for
        :meth:`take_map`.
        """
        q = self.query(x)
        pooled_k, pooled_v = (each.index_select(0, view.concept) for each in (keys.pooled_k, keys.pooled_v))
        to_patches = self.split(view.packing.pad(q)) @ keys.patch_k.transpose(-1, -2)
        to_pooled = view.packing.pad(rearrange(q * pooled_k, "token (head d) -> token head d", head=self.heads).sum(-1))
        scores = torch.cat([rearrange(to_pooled, "row slot head -> row head slot 1"), to_patches], -1)
        visible = F.pad(view.packing.pad(view.concepts.mask[view.concept]), (1, 0), value=True)
        probability = self.probabilities(scores, visible[:, None])
        if keep_map:
            self.map = view.packing.pack(rearrange(probability, "row head slot key -> row slot head key"))
            if torch.is_grad_enabled() and not self.map.requires_grad:  # all below it is frozen
                self.map.requires_grad_()
            probability = view.packing.pad(self.map)
            probability = rearrange(probability, "row slot head key -> row head slot key")
        mixed = view.packing.pack(
            rearrange(probability[..., 1:] @ keys.patch_v, "row head slot d -> row slot (head d)")
        )
        share = view.packing.pack(rearrange(probability[..., 0], "row head slot -> row slot head"))
        pooled = rearrange(pooled_v, "token (head d) -> token head d", head=self.heads) * share[..., None]
        return self.finish(x, mixed + rearrange(pooled, "token head d -> token (head d)"))


class Layer(nn.Module):
    """Self-attention, cross-attention where ``image_dim`` is given, and the feed-forward part."""

    def __init__(self, config: TextConfig, image_dim: int | None = None):
        super().__init__()
        self.dropout = config.dropout
        self.attention = SelfAttention(config)
        self.cross_attention = None if image_dim is None else CrossAttention(config, image_dim)
        self.expand = nn.Linear(config.dim, config.feed_forward)
        self.contract = nn.Linear(config.feed_forward, config.dim)
        self.norm = nn.LayerNorm(config.dim, eps=config.norm_eps)

    def feed_forward(self, x: Float[Tensor, "token dim"]) -> Float[Tensor, "token dim"]:
        hidden = self.contract(F.gelu(self.expand(x)))
        return self.norm(x + F.dropout(hidden, self.dropout, self.training))


class TextEncoder(nn.Module):
    """Embeddings and the lower layers: token ids -> contextual word states that have not seen an image.

    ``causal``: a word sees itself and those before it, as it must where the next one is to be guessed.
    """

    def __init__(self, config: TextConfig, *, causal: bool = False):
        super().__init__()
        self.causal = causal
        self.dropout, self.position_offset = config.dropout, config.position_offset
        self.words = nn.Embedding(config.vocab_size, config.dim)
        self.positions = nn.Embedding(config.max_positions, config.dim)
        self.types = nn.Embedding(config.token_types, config.dim)
        self.norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.text_layers))

    def embed(self, texts: Texts, wanted: Bool[Tensor, "text word"]) -> Float[Tensor, "token dim"]:
        """What enters the first layer for the ``wanted`` words: word, position and token type.

        Raises:
            ValueError: texts longer than the position table; on the CPU, a word that is not in the vocabulary.
        """
        longest, longest_possible = texts.mask.shape[1], self.positions.num_embeddings - self.position_offset
        if longest > longest_possible:
            raise ValueError(f"texts of {longest} tokens, but the model has {longest_possible} positions")
        position = wanted.nonzero()[:, 1] + self.position_offset
        ids = texts.ids[wanted]
        try:
            words = self.words(ids)
        except IndexError:
            raise ValueError(
                f"word {int(ids.max())} of a model with {self.words.num_embeddings} words: "
                "the tokenizer and the model do not belong together"
            ) from None
        x = self.norm(words + self.positions(position) + self.types.weight[0])
        return F.dropout(x, self.dropout, self.training)

    def forward(self, texts: Texts) -> Words:
        """
        Raises:
            ValueError: texts longer than the position table.
        """
        x = self.embed(texts, texts.mask)
        page = Page.of(texts.mask, causal=self.causal)
        for layer in self.layers:
            x = layer.feed_forward(layer.attention(x, page, x, page))
        return Words(x, texts.mask)


class CrossEncoder(nn.Module):
    """The upper layers: word states look at the tokens of a visual concept, ``[pooled, patches it may see]``.

    With ``looks: 2`` there are two of each layer, one after the other: the first looks at the first concept of a
    question, the second at its second. They share keys and values, the first of them owns these (X-VLM's NLVR2 model,
    reference ``models/model_nlvr.py``).

    ``causal``: as in :class:`TextEncoder`; a word still sees all of the concept.
    """

    def __init__(self, config: TextConfig, image_dim: int, *, causal: bool = False):
        super().__init__()
        self.causal = causal
        self.looks = config.looks
        self.layers = nn.ModuleList(Layer(config, image_dim) for _ in range(config.cross_layers * config.looks))
        for number, layer in enumerate(self.layers):
            if number % self.looks:
                del layer.cross_attention.key, layer.cross_attention.value

    def forward(
        self,
        words: Words,
        concepts: Concepts,
        about: Int[Tensor, "question"] | Int[Tensor, "question look"],
        of: Int[Tensor, "question"] | None = None,
        only: Bool[Tensor, "question word"] | None = None,
        *,
        keep_map: int | None = None,
    ) -> Words:
        """Each question lets one text look at one concept: text ``of[q]`` (``q`` if not given) at ``about[q]``.

        With more ``looks`` than one, ``about[q]`` lists as many concepts.

        The first self-attention has not seen the image yet and is done once per text; the last layer is done only for
        the words asked for in ``only`` (all if not given).

        Returns:
            States of the words asked for, question by question; their ``mask`` is ``only``.

        Raises:
            ValueError: more or fewer concepts per question than the encoder's ``looks``; not as many ``about`` as texts
                or ``of``; no layer ``keep_map``. On the CPU, a number of a text or concept that there is not: elsewhere
                to look would be to wait for the device, whose own check stops it.
        """
        about = about if about.ndim == 2 else about[:, None]
        if about.shape[1] != self.looks:
            raise ValueError(f"questions about {about.shape[1]} concepts each, but text.looks is {self.looks}")
        if keep_map is not None and keep_map not in range(len(self.layers)):
            raise ValueError(f"keep_map {keep_map}: the cross encoder has {len(self.layers)} layers, from 0 on")
        _check_numbers("about", about, len(concepts.pooled), "concepts")
        if of is not None:
            _check_numbers("of", of, len(words.mask), "texts")
        if len(about) != (questions := len(words.mask if of is None else of)):
            raise ValueError(f"about names the concepts of {len(about)} questions, but there are {questions}")
        page = Page.of(words.mask, causal=self.causal)
        x = self.layers[0].attention(words.states, page, words.states, page)
        if of is not None:
            words = Words(x, words.mask).take(of)
            x, page = words.states, Page.of(words.mask, causal=self.causal)
        asked_from, view = page, [View.of(concepts, look[page.sequence]) for look in about.unbind(1)]
        for number, layer in enumerate(self.layers):
            asking = x
            if number == len(self.layers) - 1 and only is not None:
                asking = x.index_select(0, only[words.mask].nonzero()[:, 0])
                asked_from = page.part(only)
                view[-1] = View.of(concepts, about[asked_from.sequence, -1])
            if number > 0:
                asking = layer.attention(asking, asked_from, x, page)
            look = number % self.looks
            if look == 0:
                keys = layer.cross_attention.project(concepts)
            mixed = layer.cross_attention(asking, view[look], keys, keep_map=number == keep_map)
            x = layer.feed_forward(mixed)
        return Words(x, words.mask if only is None else only)


def _check_numbers(name: str, numbers: Int[Tensor, "..."], count: int, of_what: str) -> None:
    if numbers.device.type == "cpu" and len(wrong := numbers[(numbers < 0) | (numbers >= count)]):
        raise ValueError(f"{name}: {int(wrong[0])} of {count} {of_what}, which are numbered from 0 on")
