"""State dicts with the names of the official checkpoints, small and filled with noise."""

import torch

State = dict[str, torch.Tensor]


class Noise:
    """A state dict that grows."""

    def __init__(self):
        torch.manual_seed(0)
        self.state: State = {}

    def add(self, name: str, *shape: int) -> None:
        self.state[name] = 0.1 * torch.randn(shape)

    def linear(self, name: str, out: int, into: int) -> None:
        self.add(f"{name}.weight", out, into)
        self.add(f"{name}.bias", out)

    def norm(self, name: str, width: int) -> None:
        self.add(f"{name}.weight", width)
        self.add(f"{name}.bias", width)

    def head(self, name: str, out: int, dim: int) -> None:
        self.linear(f"{name}.0", 2 * dim, dim)
        self.norm(f"{name}.1", 2 * dim)
        self.linear(f"{name}.3", out, 2 * dim)

    def swin(self, window: int) -> int:
        """Two stages, 2 + 1 blocks, windows of ``window`` patches on images of 8 * ``window`` pixels."""
        self.add("vision_encoder.patch_embed.proj.weight", 8, 3, 4, 4)
        self.add("vision_encoder.patch_embed.proj.bias", 8)
        self.norm("vision_encoder.patch_embed.norm", 8)
        for stage, (depth, heads) in enumerate([(2, 1), (1, 2)]):
            width = 8 * 2**stage
            for number in range(depth):
                block = f"vision_encoder.layers.{stage}.blocks.{number}"
                self.norm(f"{block}.norm1", width)
                self.norm(f"{block}.norm2", width)
                self.add(f"{block}.attn.relative_position_bias_table", (2 * window - 1) ** 2, heads)
                index = torch.zeros(window**2, window**2, dtype=torch.long)
                self.state[f"{block}.attn.relative_position_index"] = index
                if number == 1:
                    self.state[f"{block}.attn_mask"] = torch.zeros(4, window**2, window**2)
                self.linear(f"{block}.attn.qkv", 3 * width, width)
                self.linear(f"{block}.attn.proj", width, width)
                self.linear(f"{block}.mlp.fc1", 4 * width, width)
                self.linear(f"{block}.mlp.fc2", width, 4 * width)
        self.norm("vision_encoder.layers.0.downsample.norm", 32)
        self.add("vision_encoder.layers.0.downsample.reduction.weight", 16, 32)
        self.norm("vision_encoder.norm", 16)
        return 16

    def vit(self, side: str, dim: int = 64) -> int:
        """Two blocks; 4 x 4 patches of 8 pixels."""
        self.add(f"{side}.cls_token", 1, 1, dim)
        self.add(f"{side}.pos_embed", 1, 17, dim)
        self.add(f"{side}.patch_embed.proj.weight", dim, 3, 8, 8)
        self.add(f"{side}.patch_embed.proj.bias", dim)
        for number in range(2):
            block = f"{side}.blocks.{number}"
            self.norm(f"{block}.norm1", dim)
            self.norm(f"{block}.norm2", dim)
            self.linear(f"{block}.attn.qkv", 3 * dim, dim)
            self.linear(f"{block}.attn.proj", dim, dim)
            self.linear(f"{block}.mlp.fc1", 2 * dim, dim)
            self.linear(f"{block}.mlp.fc2", dim, 2 * dim)
        self.norm(f"{side}.norm", dim)
        return dim

    def clip(self, dim: int = 64) -> int:
        """The same in CLIP's names."""
        side = "vision_encoder"
        self.add(f"{side}.class_embedding", dim)
        self.state[f"{side}.position_ids"] = torch.arange(17)[None]
        self.add(f"{side}.patch_embed.weight", dim, 3, 8, 8)
        self.add(f"{side}.pos_embed.weight", 17, dim)
        self.norm(f"{side}.pre_layrnorm", dim)
        for number in range(2):
            layer = f"{side}.encoder.layers.{number}"
            for part in "kvq":
                self.linear(f"{layer}.self_attn.{part}_proj", dim, dim)
            self.linear(f"{layer}.self_attn.out_proj", dim, dim)
            self.norm(f"{layer}.layer_norm1", dim)
            self.norm(f"{layer}.layer_norm2", dim)
            self.linear(f"{layer}.mlp.fc1", 2 * dim + 1, dim)
            self.linear(f"{layer}.mlp.fc2", dim, 2 * dim + 1)
        self.norm(f"{side}.post_layernorm", dim)
        return dim

    def layers(self, side: str, dim: int, source: int, *, reading: int, fusing: int, looks: int = 1) -> None:
        """Of a BERT; the ``fusing`` ones attend to vectors of ``source`` numbers too, ``looks`` share these layers."""
        for number in range(reading + fusing):
            layer, look = f"{side}encoder.layer.{number}", (number - reading) % looks
            for attention, into in [("attention", dim), ("crossattention", source)][: 1 + (number >= reading)]:
                self.linear(f"{layer}.{attention}.self.query", dim, dim)
                for part in ("key", "value"):
                    name = f"{layer}.{attention}.self.{part}"
                    self.linear(name, dim, into)
                    if attention == "crossattention" and look:
                        for kind in ("weight", "bias"):
                            first = name.replace(f"layer.{number}.", f"layer.{number - look}.")
                            self.state[f"{name}.{kind}"] = self.state[f"{first}.{kind}"]
                self.linear(f"{layer}.{attention}.output.dense", dim, dim)
                self.norm(f"{layer}.{attention}.output.LayerNorm", dim)
            self.linear(f"{layer}.intermediate.dense", 2 * dim, dim)
            self.linear(f"{layer}.output.dense", dim, 2 * dim)
            self.norm(f"{layer}.output.LayerNorm", dim)

    def embeddings(self, side: str, dim: int, vocabulary: int, types: int) -> None:
        self.state[f"{side}embeddings.position_ids"] = torch.arange(16)[None]
        for table, rows in (("word", vocabulary), ("position", 16), ("token_type", types)):
            self.add(f"{side}embeddings.{table}_embeddings.weight", rows, dim)
        self.norm(f"{side}embeddings.LayerNorm", dim)

    def word_head(self, side: str, bert: str, dim: int, vocabulary: int) -> None:
        names = ("cls.predictions", "transform.dense", "transform.LayerNorm")
        head, dense, norm = ("lm_head", "dense", "layer_norm") if bert == "roberta." else names
        head = f"{side}{head}"
        self.add(f"{head}.bias", vocabulary)
        self.linear(f"{head}.{dense}", dim, dim)
        self.norm(f"{head}.{norm}", dim)
        self.state[f"{head}.decoder.weight"] = self.state[f"{side}{bert}embeddings.word_embeddings.weight"]
        self.state[f"{head}.decoder.bias"] = self.state[f"{head}.bias"]


def checkpoint(
    task: str = "pretraining",
    trunk: str = "swin",
    *,
    roberta: bool = False,
    dim: int = 64,
    window: int = 4,
    vocabulary: int = 60,
) -> State:
    """One of each kind, for images of 32 pixels; ``trunk`` is swin, vit, clip or albef. The BERT has 2 + 2 layers."""
    noise = Noise()
    width = {
        "swin": lambda: noise.swin(window),
        "vit": lambda: noise.vit("vision_encoder"),
        "clip": noise.clip,
        "albef": lambda: noise.vit("visual_encoder"),
    }[trunk]()
    types, looks = (1, 2)[not roberta], 2 if task.startswith("nlvr") else 1
    family = "roberta." if roberta else "bert."
    inner = family if task == "pretraining" else ""
    encoder = "text_decoder." + family if task == "captioning" else "text_encoder." + inner
    noise.embeddings(encoder, dim, vocabulary, types)
    noise.layers(encoder, dim, width, reading=2, fusing=2 * looks, looks=looks)
    if task == "vqa":
        noise.embeddings(f"text_decoder.{family}", dim, vocabulary, types)
        noise.layers(f"text_decoder.{family}", dim, dim, reading=0, fusing=3)
    if task in ("pretraining", "vqa", "captioning"):
        side = "text_encoder." if task == "pretraining" else "text_decoder."
        noise.word_head(side, family, dim, vocabulary)
    if task in ("pretraining", "retrieval"):
        noise.state["temp"] = torch.tensor(0.07)
        noise.linear("text_proj", 8, dim)
    if task in ("pretraining", "retrieval", "nlvr_pretraining"):
        noise.linear("vision_proj", 8, width)
    if task in ("pretraining", "retrieval"):
        noise.linear("itm_head", 2, dim) if trunk == "albef" else noise.head("itm_head", 2, dim)
    if task == "grounding" or (task == "pretraining" and trunk != "albef"):
        noise.head("bbox_head", 4, dim)
    if task == "nlvr":
        noise.head("cls_head", 2, dim)
    if task == "nlvr_pretraining":
        noise.linear("ta_head", 3, dim)
    return noise.state | (_momentum(noise.state) if trunk == "albef" else {})


def _momentum(state: State) -> State:
    """What ALBEF's training keeps in the file besides the model."""
    averaged = ("visual_encoder", "text_encoder", "text_decoder", "vision_proj", "text_proj")
    split = ((name.partition("."), tensor) for name, tensor in state.items())
    copies = {f"{part}_m.{inside}": tensor for (part, _, inside), tensor in split if part in averaged}
    queues = {f"{side}_queue": torch.randn(8, 32) for side in ("image", "text")}
    return copies | queues | {"idx_queue": torch.full((1, 32), -100), "queue_ptr": torch.zeros(1, dtype=torch.long)}
