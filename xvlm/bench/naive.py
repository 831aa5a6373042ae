"""A pre-training step written the naive way: padded text, tokens copied for each text, a fusion pass for each question.

It uses the modules of the model, so that weights, dropout and precision are those of the packed step, and only the work
differs: what :mod:`xvlm.bench.step` measures, and what tests hold packing and sharing to.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from xvlm import losses
from xvlm.models.text import Attention, Layer, TextEncoder
from xvlm.models.xvlm import XVLM
from xvlm.types import Batch, Concepts, Words


def naive_losses(model: XVLM, batch: Batch) -> dict[str, Tensor]:
    """The losses of :meth:`xvlm.tasks.pretraining.Task.losses` at its defaults, computed the naive way.

    Args:
        batch: with hidden words, and texts padded to whatever length.
    """
    concepts = model.encode_image(batch.images, batch.regions)
    mask, count = batch.texts.mask, len(batch.texts.ids)
    clean = read_padded(model.text, batch.texts.ids, mask)
    masked = read_padded(model.text, batch.masked.ids, mask)
    part = concepts.take(len(batch.images) + torch.arange(count, device=mask.device))
    image, text = model.embed_image(part), model.embed_text(Words(clean[mask], mask))
    texts, wrong_image, images, wrong_text = losses.hard_negatives(image, text, model.temperature)
    right = fuse_padded(model, clean, mask, part)
    fused = [
        right,
        fuse_padded(model, clean[texts], mask[texts], part.take(wrong_image)),
        fuse_padded(model, clean[wrong_text], mask[wrong_text], part.take(images)),
    ]
    match = torch.arange(sum(len(states) for states in fused), device=mask.device) < count
    logits = torch.cat([model.match(_first(states)) for states in fused])
    guesses = model.guess_words(fuse_padded(model, masked, mask, part).flatten(0, 1)).float()
    words = batch.texts.ids.masked_fill(~batch.masked.hidden, -100).flatten()
    located = model.locate(_first(fuse_padded(model, clean, mask, concepts.take(batch.regions.image))))
    boxed = ~batch.regions.whole
    l1, giou = losses.box_l1_giou(located[boxed], batch.regions.boxes_cxcywh[boxed])
    return {
        "itc": losses.contrastive(image, text, model.temperature),
        "itm": losses.matching(logits, match.long()),
        "mlm": F.cross_entropy(guesses, words, ignore_index=-100),
        "box_l1": l1,
        "box_giou": giou,
    }


def read_padded(
    encoder: TextEncoder, ids: Int[Tensor, "text word"], mask: Bool[Tensor, "text word"]
) -> Float[Tensor, "text word dim"]:
    """What ``encode_text`` gives, computed for the padding too."""
    position = torch.arange(ids.shape[1], device=ids.device) + encoder.position_offset
    x = encoder.norm(encoder.words(ids) + encoder.positions(position) + encoder.types.weight[0])
    x = F.dropout(x, encoder.dropout, encoder.training)
    for layer in encoder.layers:
        x = _feed_forward(layer, _attend(layer.attention, x, x, mask))
    return x


def fuse_padded(
    model: XVLM, words: Float[Tensor, "text word dim"], mask: Bool[Tensor, "text word"], concepts: Concepts
) -> Float[Tensor, "text word dim"]:
    """What ``fuse`` gives where text ``i`` is about concept ``i``: tokens copied for each text, padding computed."""
    tokens = torch.cat([concepts.pooled[:, None], concepts.patches[concepts.row]], 1)
    visible = F.pad(concepts.mask, (1, 0), value=True)
    for layer in model.cross.layers:
        words = _attend(layer.attention, words, words, mask)
        words = _feed_forward(layer, _attend(layer.cross_attention, words, tokens, visible))
    return words


def _attend(
    attention: Attention,
    x: Float[Tensor, "text word dim"],
    tokens: Float[Tensor, "text token width"],
    visible: Bool[Tensor, "text token"],
) -> Float[Tensor, "text word dim"]:
    q = attention.split(attention.query(x))
    k, v = attention.split(attention.key(tokens)), attention.split(attention.value(tokens))
    mixed = attention.probabilities(q @ k.transpose(-1, -2), visible[:, None, None]) @ v
    mixed = rearrange(mixed, "text head word d -> (text word) (head d)")
    return attention.finish(x.flatten(0, 1), mixed).unflatten(0, x.shape[:2])


def _feed_forward(layer: Layer, x: Float[Tensor, "text word dim"]) -> Float[Tensor, "text word dim"]:
    return layer.feed_forward(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def _first(states: Float[Tensor, "text word dim"]) -> Words:
    """[CLS] alone, as the heads take it."""
    return Words(states[:, 0], torch.ones(len(states), 1, dtype=torch.bool, device=states.device))
