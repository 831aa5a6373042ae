"""A state dict with the names of the official checkpoints, small and filled with noise."""

import torch

State = dict[str, torch.Tensor]


def checkpoint(*, dim: int = 64, window: int = 4, vocabulary: int = 60) -> State:
    """Pre-training: a Swin of two stages with windows of 4 patches on images of 32 pixels, a BERT of 2 + 2 layers."""
    torch.manual_seed(0)
    state: State = {"temp": torch.tensor(0.07)}

    def add(name: str, *shape: int) -> None:
        state[name] = 0.1 * torch.randn(shape)

    def linear(name: str, out: int, into: int) -> None:
        add(f"{name}.weight", out, into)
        add(f"{name}.bias", out)

    def norm(name: str, width: int) -> None:
        add(f"{name}.weight", width)
        add(f"{name}.bias", width)

    add("vision_encoder.patch_embed.proj.weight", 8, 3, 4, 4)
    add("vision_encoder.patch_embed.proj.bias", 8)
    norm("vision_encoder.patch_embed.norm", 8)
    for stage, (depth, heads) in enumerate([(2, 1), (1, 2)]):
        width = 8 * 2**stage
        for number in range(depth):
            block = f"vision_encoder.layers.{stage}.blocks.{number}"
            norm(f"{block}.norm1", width)
            norm(f"{block}.norm2", width)
            add(f"{block}.attn.relative_position_bias_table", (2 * window - 1) ** 2, heads)
            state[f"{block}.attn.relative_position_index"] = torch.zeros(window**2, window**2, dtype=torch.long)
            if number == 1:
                state[f"{block}.attn_mask"] = torch.zeros(4, window**2, window**2)
            linear(f"{block}.attn.qkv", 3 * width, width)
            linear(f"{block}.attn.proj", width, width)
            linear(f"{block}.mlp.fc1", 4 * width, width)
            linear(f"{block}.mlp.fc2", width, 4 * width)
    norm("vision_encoder.layers.0.downsample.norm", 32)
    add("vision_encoder.layers.0.downsample.reduction.weight", 16, 32)
    norm("vision_encoder.norm", 16)

    bert = "text_encoder.bert"
    state[f"{bert}.embeddings.position_ids"] = torch.arange(16)[None]
    for table, rows in (("word", vocabulary), ("position", 16), ("token_type", 2)):
        add(f"{bert}.embeddings.{table}_embeddings.weight", rows, dim)
    norm(f"{bert}.embeddings.LayerNorm", dim)
    for number in range(4):
        layer = f"{bert}.encoder.layer.{number}"
        for attention, source in [("attention", dim), ("crossattention", 16)][: 1 + (number >= 2)]:
            linear(f"{layer}.{attention}.self.query", dim, dim)
            linear(f"{layer}.{attention}.self.key", dim, source)
            linear(f"{layer}.{attention}.self.value", dim, source)
            linear(f"{layer}.{attention}.output.dense", dim, dim)
            norm(f"{layer}.{attention}.output.LayerNorm", dim)
        linear(f"{layer}.intermediate.dense", 2 * dim, dim)
        linear(f"{layer}.output.dense", dim, 2 * dim)
        norm(f"{layer}.output.LayerNorm", dim)
    head = "text_encoder.cls.predictions"
    add(f"{head}.bias", vocabulary)
    linear(f"{head}.transform.dense", dim, dim)
    norm(f"{head}.transform.LayerNorm", dim)
    state[f"{head}.decoder.weight"] = state[f"{bert}.embeddings.word_embeddings.weight"]
    state[f"{head}.decoder.bias"] = state[f"{head}.bias"]
    linear("vision_proj", 8, 16)
    linear("text_proj", 8, dim)
    for name, out in (("itm_head", 2), ("bbox_head", 4)):
        linear(f"{name}.0", 2 * dim, dim)
        norm(f"{name}.1", 2 * dim)
        linear(f"{name}.3", out, 2 * dim)
    return state
