"""The text encoder and the cross encoder: the lower and the upper half of a BERT stack, on packed words.

Words of all texts lie one after another without padding; only attention, which needs to know where a text ends, works
on the padded layout. Image keys and values are projected once per image and layer, however many texts look at it
(X-VLM, arXiv 2111.08276, section 3.2; reference ``models/xbert.py``).
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from xvlm.config import Configured
from xvlm.types import Concepts, Texts, Words


class TextConfig(Configured):
    """Shape of the BERT stack; the defaults are bert-base-uncased as X-VLM uses it."""

    vocab_size: int = 30522
    dim: int = 768
    heads: int = 12
    feed_forward: int = 3072
    text_layers: int = 6  # the text encoder
    cross_layers: int = 6  # the cross encoder: these also look at the image
    max_positions: int = 512
    token_types: int = 2
    dropout: float = 0.1
    norm_eps: float = 1e-12


@dataclass(frozen=True)
class Packing:
    """Where packed tokens sit in the padded layout."""

    mask: Bool[Tensor, "text word"]
    position: Int[Tensor, "token"]  # in the flattened padded layout

    @classmethod
    def of(cls, mask: Bool[Tensor, "text word"]) -> "Packing":
        return cls(mask, mask.flatten().nonzero()[:, 0])

    def pad(self, packed: Float[Tensor, "token dim"]) -> Float[Tensor, "text word dim"]:
        flat = packed.new_zeros(self.mask.numel(), packed.shape[1]).index_copy(0, self.position, packed)
        return rearrange(flat, "(text word) dim -> text word dim", text=len(self.mask))

    def pack(self, padded: Float[Tensor, "text word dim"]) -> Float[Tensor, "token dim"]:
        return rearrange(padded, "text word dim -> (text word) dim").index_select(0, self.position)


@dataclass(frozen=True)
class Seen:
    """Keys and values of image tokens for one cross layer, and which of them each text may look at."""

    keys: Float[Tensor, "text seen dim"]
    values: Float[Tensor, "text seen dim"]
    mask: Bool[Tensor, "text seen"]


class Attention(nn.Module):
    """Multi-head attention with output projection, residual and LayerNorm, as in BERT (post-norm).

    After a call with ``keep_map`` the attention probabilities (text, head, word, key) are in ``self.map``.
    """

    def __init__(self, config: TextConfig, key_dim: int):
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.query = nn.Linear(config.dim, config.dim)
        self.key = nn.Linear(key_dim, config.dim)
        self.value = nn.Linear(key_dim, config.dim)
        self.out = nn.Linear(config.dim, config.dim)
        self.norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.map: Tensor | None = None

    def forward(
        self, x: Float[Tensor, "token dim"], packing: Packing, seen: Seen, *, keep_map: bool = False
    ) -> Float[Tensor, "token dim"]:
        def split(t: Tensor) -> Tensor:
            return rearrange(t, "text n (head d) -> text head n d", head=self.heads)

        q, k, v = split(packing.pad(self.query(x))), split(seen.keys), split(seen.values)
        mask = seen.mask[:, None, None, :]
        dropout = self.dropout if self.training else 0.0
        if keep_map:
            scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
            self.map = scores.masked_fill(~mask, float("-inf")).softmax(-1)
            mixed = F.dropout(self.map, dropout, self.training) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        mixed = packing.pack(rearrange(mixed, "text head n d -> text n (head d)"))
        return self.norm(x + F.dropout(self.out(mixed), self.dropout, self.training))


class Layer(nn.Module):
    """Self-attention, cross-attention where ``image_dim`` is given, and the feed-forward part."""

    def __init__(self, config: TextConfig, image_dim: int | None = None):
        super().__init__()
        self.dropout = config.dropout
        self.attention = Attention(config, config.dim)
        self.cross_attention = None if image_dim is None else Attention(config, image_dim)
        self.expand = nn.Linear(config.dim, config.feed_forward)
        self.contract = nn.Linear(config.feed_forward, config.dim)
        self.norm = nn.LayerNorm(config.dim, eps=config.norm_eps)

    def forward(
        self, x: Float[Tensor, "token dim"], packing: Packing, image: Seen | None = None, *, keep_map: bool = False
    ) -> Float[Tensor, "token dim"]:
        words = Seen(packing.pad(self.attention.key(x)), packing.pad(self.attention.value(x)), packing.mask)
        x = self.attention(x, packing, words)
        if image is not None:
            x = self.cross_attention(x, packing, image, keep_map=keep_map)
        hidden = self.contract(F.gelu(self.expand(x)))
        return self.norm(x + F.dropout(hidden, self.dropout, self.training))


class TextEncoder(nn.Module):
    """Embeddings and the lower layers: token ids -> contextual word states that have not seen an image."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.dropout = config.dropout
        self.words = nn.Embedding(config.vocab_size, config.dim)
        self.positions = nn.Embedding(config.max_positions, config.dim)
        self.types = nn.Embedding(config.token_types, config.dim)
        self.norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.text_layers))

    def forward(self, texts: Texts) -> Words:
        """
        Raises:
            ValueError: texts longer than the position table.
        """
        longest = texts.mask.shape[1]
        if longest > self.positions.num_embeddings:
            raise ValueError(f"texts of {longest} tokens, but the model has {self.positions.num_embeddings} positions")
        packing = Packing.of(texts.mask)
        ids = texts.ids.flatten()[packing.position]
        position = packing.position % longest
        x = self.norm(self.words(ids) + self.positions(position) + self.types.weight[0])
        x = F.dropout(x, self.dropout, self.training)
        for layer in self.layers:
            x = layer(x, packing)
        return Words(x, texts.mask)


class CrossEncoder(nn.Module):
    """The upper layers: word states look at the tokens of a visual concept, ``[pooled, patches it may see]``."""

    def __init__(self, config: TextConfig, image_dim: int):
        super().__init__()
        self.layers = nn.ModuleList(Layer(config, image_dim) for _ in range(config.cross_layers))

    def forward(
        self, words: Words, concepts: Concepts, about: Int[Tensor, "text"], *, keep_map: int | None = None
    ) -> Words:
        """Let text ``t`` look at concept ``about[t]``.

        Args:
            keep_map: number of a cross layer whose attention map (text, head, word, 1 + patch) is kept, with gradient,
                in ``layers[n].cross_attention.map``.
        """
        packing = Packing.of(words.mask)
        chosen = concepts.take(about)
        mask = F.pad(chosen.mask, (1, 0), value=True)  # the pooled token is always seen
        x = words.states
        for number, layer in enumerate(self.layers):
            attention = layer.cross_attention
            keys = _tokens_of(attention.key, concepts, about, chosen.row)
            values = _tokens_of(attention.value, concepts, about, chosen.row)
            x = layer(x, packing, Seen(keys, values, mask), keep_map=number == keep_map)
        return replace(words, states=x)


def _tokens_of(
    project: nn.Linear, concepts: Concepts, about: Int[Tensor, "text"], row: Int[Tensor, "text"]
) -> Float[Tensor, "text seen dim"]:
    """Projected [pooled, patches] per text; every patch and pooled token is projected once, then pointed at."""
    pooled, patches = project(concepts.pooled), project(concepts.patches)
    return torch.cat([pooled.index_select(0, about)[:, None], patches.index_select(0, row)], 1)
