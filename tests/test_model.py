"""The three verbs: regions are special cases of nothing, packing changes nothing, folders load strictly."""

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from xvlm import boxes
from xvlm.models.vision import VisionConfig, VisionEncoder
from xvlm.models.xvlm import XVLM
from xvlm.types import Regions, Texts


def whole(images: int, size: int = 32) -> Regions:
    box = torch.tensor([[0.0, 0.0, size, size]]).repeat(images, 1)
    return Regions(torch.arange(images), box / size, box, torch.zeros(images, dtype=torch.bool))


def test_the_whole_image_is_the_box_that_covers_everything():
    model, batch = tiny.model(), tiny.batch()
    concepts = model.encode_image(batch.images, whole(3))
    torch.testing.assert_close(concepts.pooled[:3], concepts.pooled[3:], atol=1e-6, rtol=1e-5)
    assert torch.equal(concepts.mask[:3], concepts.mask[3:])
    words, image = model.encode_text(Texts(batch.texts.ids[:3], batch.texts.mask[:3])), torch.arange(3)
    plain, region = model.fuse(words, concepts, image), model.fuse(words, concepts, 3 + image)
    torch.testing.assert_close(plain.states, region.states, atol=1e-5, rtol=1e-5)


def test_region_tokens_are_the_mean_of_the_patches_in_the_box():
    model, batch = tiny.model(), tiny.batch()
    concepts = model.encode_image(batch.images, batch.regions)
    for r, image in enumerate(batch.regions.image.tolist()):
        if batch.regions.whole[r]:
            continue
        x, y, w, h = batch.regions.boxes_xywh[r].tolist()
        rows, columns = concepts.grid
        inside = [
            concepts.patches[image, row * columns + column]
            for row in range(rows)
            for column in range(columns)
            if column * 32 / columns < x + w and (column + 1) * 32 / columns > x
            if row * 32 / rows < y + h and (row + 1) * 32 / rows > y
        ]
        torch.testing.assert_close(concepts.pooled[3 + r], torch.stack(inside).mean(0), atol=1e-5, rtol=1e-5)


def test_soft_pooling_weighs_patches_by_the_area_covered():
    cover = boxes.patch_cover(torch.tensor([[8.0, 0.0, 16.0, 16.0], [3.0, 3.0, 0.0, 0.0]]), (2, 2), (32, 32))
    assert cover[0].tolist() == [0.5, 0.5, 0, 0]
    assert cover[1].tolist() == [1, 0, 0, 0]  # a box of no area has the patch it lies in


def test_a_text_alone_is_the_same_as_in_a_batch():
    model, batch = tiny.model(), tiny.batch()
    concepts = model.encode_image(batch.images, batch.regions)
    about = torch.arange(len(batch.texts.ids)) + 3
    together = model.fuse(model.encode_text(batch.texts), concepts, about)
    for i in range(len(about)):
        alone = model.encode_text(Texts(batch.texts.ids[i : i + 1], batch.texts.mask[i : i + 1]))
        fused = model.fuse(alone, concepts, about[i : i + 1])
        torch.testing.assert_close(fused.states, together.take(torch.tensor([i])).states, atol=1e-5, rtol=1e-5)


def test_words_hidden_by_the_mask_and_patches_outside_the_box_change_nothing():
    model, batch = tiny.model(), tiny.batch()
    region = 1  # a region of image 0
    concepts = model.encode_image(batch.images, batch.regions)
    words = model.encode_text(Texts(batch.texts.ids[:1], batch.texts.mask[:1]))
    before = model.fuse(words, concepts, torch.tensor([3 + region])).states
    concepts.patches[0][~concepts.mask[3 + region]] = 99.0
    torch.testing.assert_close(model.fuse(words, concepts, torch.tensor([3 + region])).states, before)
    ids = torch.where(batch.texts.mask, batch.texts.ids, 7)
    torch.testing.assert_close(
        model.encode_text(Texts(ids, batch.texts.mask)).states, model.encode_text(batch.texts).states
    )


def test_asking_for_some_words_gives_what_asking_for_all_gives():
    model, batch = tiny.model(), tiny.batch()
    concepts, words = model.encode_image(batch.images, batch.regions), model.encode_text(batch.texts)
    of, about = torch.tensor([0, 4, 4, 2]), torch.tensor([3, 0, 7, 1])
    everything = model.fuse(words.take(of), concepts, about)
    only = batch.masked.hidden[of]
    only[0, 0] = True
    some = model.fuse(words, concepts, about, of, only)
    torch.testing.assert_close(some.states, everything.padded()[only], atol=1e-5, rtol=1e-5)
    assert torch.equal(some.mask, only)


def test_images_are_projected_once_per_layer_whoever_asks():
    model, batch = tiny.model(), tiny.batch()
    concepts, words = model.encode_image(batch.images, batch.regions), model.encode_text(batch.texts)
    projected = []
    for layer in model.cross.layers:
        for part in (layer.cross_attention.key, layer.cross_attention.value):
            part.register_forward_hook(lambda part, inputs, _: projected.append(inputs[0].numel() // part.in_features))
    tokens = len(concepts.pooled) + concepts.patches.shape[0] * concepts.patches.shape[1]
    for questions in (1, 40):
        projected.clear()
        of, about = torch.randint(9, (questions,)), torch.randint(12, (questions,))
        model.fuse(words, concepts, about, of)
        assert sum(projected) == 2 * len(model.cross.layers) * tokens


@pytest.mark.parametrize(
    ("about", "of", "message"),
    [
        ([0, 12], [0, 1], "about: 12 of 12 concepts, which are numbered from 0 on"),
        ([-1, 0], [0, 1], "about: -1 of 12 concepts"),
        ([0, 1], [0, 9], "of: 9 of 9 texts"),
        ([0, 1], None, "about names the concepts of 2 questions, but there are 9"),
    ],
)
def test_questions_about_what_is_not_there_are_refused(about, of, message):
    model, batch = tiny.model(), tiny.batch()
    concepts, words = model.encode_image(batch.images, batch.regions), model.encode_text(batch.texts)
    with pytest.raises(ValueError, match=message):
        model.fuse(words, concepts, torch.tensor(about), None if of is None else torch.tensor(of))


def test_nothing_asked_is_nothing_answered():
    model, batch = tiny.model(), tiny.batch()
    concepts, words = model.encode_image(batch.images, batch.regions), model.encode_text(batch.texts)
    none = torch.zeros(0, dtype=torch.long)
    assert model.match(model.fuse(words, concepts, none, none)).shape == (0, 2)
    unwanted = model.fuse(words, concepts, torch.arange(9), only=torch.zeros_like(words.mask))
    assert unwanted.states.shape == (0, 16)
    with pytest.raises(ValueError, match="no word of text 0 of 9 is stored"):  # another text's word is no answer
        model.match(unwanted)
    empty = Texts(batch.texts.ids[:0], batch.texts.mask[:0])
    assert model.embed_text(model.encode_text(empty)).shape == (0, 8)
    assert model.embed_regions(batch.images[0], torch.zeros(0, 4)).shape == (0, 8)
    with pytest.raises(ValueError, match="there are no images to encode"):
        model.encode_image(batch.images[:0])


@pytest.mark.parametrize("number", [-1, 2])
def test_a_map_of_a_layer_that_is_not_there_is_refused(number):
    model, batch = tiny.model(), tiny.batch()
    concepts, words = model.encode_image(batch.images, batch.regions), model.encode_text(batch.texts)
    with pytest.raises(ValueError, match=f"keep_map {number}: the cross encoder has 2 layers, from 0 on"):
        model.fuse(words, concepts, torch.arange(9), keep_map=number)


@pytest.mark.parametrize("number", [0, 1])
def test_attention_maps_are_kept_with_gradient(number):
    model, batch = tiny.model(), tiny.batch()
    concepts, words = model.encode_image(batch.images, batch.regions), model.encode_text(batch.texts)
    of, about = torch.tensor([0, 4, 4, 8, 2]), torch.tensor([3, 0, 7, 11, 1])
    attention, asking = model.cross.layers[number].cross_attention, []
    hook = attention.register_forward_pre_hook(lambda _, inputs: asking.append(inputs[0]))
    fused = model.fuse(words, concepts, about, of, keep_map=number)
    hook.remove()
    torch.testing.assert_close(fused.states, model.fuse(words, concepts, about, of).states, atol=1e-6, rtol=1e-5)

    # Written out: each word's softmax over the pooled token and the patches that its concept shows.
    kept, row = attention.take_map(), 0
    assert attention.map is None
    assert kept.shape == (len(fused.states), attention.heads, 1 + concepts.patches.shape[1])
    for q, concept in enumerate(about.tolist()):
        tokens = torch.cat([concepts.pooled[concept][None], concepts.patches[concepts.row[concept]]])
        hidden = torch.cat([torch.tensor([False]), ~concepts.mask[concept]])
        for _ in range(int(words.mask[of[q]].sum())):
            query, key = attention.query(asking[0][row]), attention.key(tokens)
            for head, part in enumerate(torch.arange(len(query)).chunk(attention.heads)):
                scores = (key[:, part] @ query[part] / len(part) ** 0.5).masked_fill(hidden, -torch.inf)
                torch.testing.assert_close(kept[row, head], scores.softmax(0), atol=1e-6, rtol=1e-5)
            row += 1
    assert row == len(kept)
    (gradient,) = torch.autograd.grad(model.match(fused)[:, 1].sum(), kept)
    assert (gradient.abs().sum((1, 2)) > 0).any() and not gradient.isnan().any()


@pytest.mark.parametrize(
    ("trunk", "options", "size", "grid"),
    [
        ("swin_tiny_patch4_window7_224", tiny.SWIN, (32, 32), (4, 4)),
        ("vit_tiny_patch16_224", {"embed_dim": 24, "depth": 1, "num_heads": 2}, (32, 48), (2, 3)),
        ("resnet10t", {"channels": (8, 8, 8, 8), "output_stride": 16}, (64, 96), (4, 6)),
        ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 16)}, (64, 64), (2, 2)),
    ],
)
def test_any_trunk_gives_patches_in_reading_order(trunk, options, size, grid):
    encoder = VisionEncoder(VisionConfig(trunk=trunk, options=options, image_size=size, positions=True)).eval()
    concepts = encoder(torch.randn(2, 3, *size))
    assert concepts.grid == grid
    assert concepts.patches.shape == (2, grid[0] * grid[1], encoder.dim)
    image = torch.zeros(1, 3, *size)
    image[:, :, -8:, -8:] = 3.0  # only the lower right corner differs: so does its patch, most of all
    changed = (encoder(image).patches - encoder(torch.zeros(1, 3, *size)).patches).norm(dim=-1)[0]
    assert changed.argmax() == grid[0] * grid[1] - 1


VIT = VisionConfig(
    trunk="vit_tiny_patch16_224",
    options={"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2},
    image_size=(32, 32),
    local_layers=2,
)


def test_local_layers_see_the_class_token_and_the_box_alone():
    encoder, batch = VisionEncoder(VIT).eval(), tiny.batch()
    concepts = encoder(batch.images, batch.regions)
    part = concepts.take(len(batch.images) + torch.arange(len(batch.texts.ids)))
    assert len(concepts.patches) == len(batch.images) + (~batch.regions.whole).sum()  # nothing is encoded twice
    shared = []
    handle = encoder.trunk.blocks[1].register_forward_pre_hook(lambda _, inputs: shared.append(inputs[0]))
    whole = encoder.trunk.forward_features(batch.images)
    handle.remove()
    for r, image in enumerate(batch.regions.image.tolist()):
        inside = part.mask[r].nonzero()[:, 0]
        seen = torch.cat([torch.zeros(1, dtype=torch.long), 1 + inside])
        expected = encoder.trunk.norm(encoder.trunk.blocks[1:](shared[0][image : image + 1, seen]))[0]
        if batch.regions.whole[r]:
            torch.testing.assert_close(expected, whole[image], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(part.pooled[r], expected[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(part.patches[part.row[r], inside], expected[1:], atol=1e-5, rtol=1e-5)


def test_local_layers_leave_whole_images_alone():
    encoder, batch = VisionEncoder(VIT).eval(), tiny.batch(whole=True)
    plain, captions = encoder(batch.images), encoder(batch.images, batch.regions)
    assert torch.equal(captions.patches, plain.patches)
    assert torch.equal(captions.row, plain.row.repeat(2)) and torch.equal(captions.pooled, plain.pooled.repeat(2, 1))


def test_local_layers_that_cannot_be_are_errors():
    with pytest.raises(ValueError, match="nothing is pooled"):
        VisionConfig(local_layers=2, pooling="soft")
    with pytest.raises(ValueError, match="local_layers needs a ViT with a class token, swin_tiny"):
        VisionEncoder(tiny.VISION.model_copy(update={"local_layers": 1}))
    with pytest.raises(ValueError, match="local_layers is 3, vit_tiny_patch16_224 has 3 blocks"):
        VisionEncoder(VIT.model_copy(update={"local_layers": 3}))


@pytest.mark.parametrize("vision", [tiny.VISION, VIT], ids=["swin", "vit"])
def test_every_parameter_gets_a_gradient(vision):
    from xvlm.tasks.pretraining import PretrainingConfig, Task

    task = Task(PretrainingConfig(), tiny.model(tiny.CONFIG.model_copy(update={"vision": vision})))
    sum(task({"region": tiny.batch()}).values()).backward()
    without = [name for name, p in task.named_parameters() if p.grad is None]
    assert without == []


def test_an_unknown_trunk_and_a_wrong_image_size_are_named():
    with pytest.raises(ValueError, match="'resnet51x' is not a timm model"):
        VisionEncoder(VisionConfig(trunk="resnet51x"))
    with pytest.raises(ValueError, match=r"vision.options .'widht': 2. do not fit resnet18: .*'widht'"):
        VisionEncoder(VisionConfig(trunk="resnet18", options={"widht": 2}))
    with pytest.raises(ValueError, match=r"images are \(40, 40\), the model was built for \(32, 32\)"):
        tiny.model().encode_image(torch.zeros(1, 3, 40, 40))


def test_folders_round_trip_and_load_strictly(tmp_path):
    model, batch = tiny.model(), tiny.batch()
    model.save_pretrained(tmp_path)
    again = XVLM.from_pretrained(tmp_path)
    assert again.config == model.config
    before, after = (m.encode_image(batch.images, batch.regions).pooled for m in (model, again))
    assert torch.equal(before, after)

    file = tmp_path / "model.safetensors"
    state = load_file(file)
    save_file({name: t for name, t in state.items() if name != "text.norm.bias"} | {"extra": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match=r"model.safetensors: missing text.norm.bias; unexpected extra"):
        XVLM.from_pretrained(tmp_path)
    save_file(state | {"text.norm.bias": torch.zeros(3)}, file)
    with pytest.raises(ValueError, match=r"text.norm.bias has shape \(3,\), expected \(16,\)"):
        XVLM.from_pretrained(tmp_path)


LACKING = ["box_head", "cross", "image_projection", "itm_head", "temperature", "text_projection", "word_head"]


@pytest.fixture
def towers(tmp_path):
    """A folder whose weights are those of the two towers, and the model they are of."""
    model = tiny.model()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({name: t for name, t in load_file(file).items() if name.startswith(("vision.", "text."))}, file)
    return model, tmp_path


def test_parts_start_fresh_only_where_they_are_named(towers, caplog):
    model, folder = towers
    with pytest.raises(ValueError, match=rf"missing all of {', '.join(LACKING)}; fresh=\['box_head', .*'word_head'\]"):
        XVLM.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"missing all of word_head; fresh="):
        XVLM.from_pretrained(folder, fresh=LACKING[:-1])
    with pytest.raises(ValueError, match=r"safetensors: text in fresh, but only parts that the weights lack"):
        XVLM.from_pretrained(folder, fresh=[*LACKING, "text"])
    again = XVLM.from_pretrained(folder, fresh=LACKING)
    assert f"start from random values: {', '.join(LACKING)}" in caplog.text
    assert all(torch.equal(tensor, model.text.state_dict()[name]) for name, tensor in again.text.state_dict().items())


def test_a_tower_must_be_whole_and_what_else_is_wrong_is_named_at_once(towers):
    _, folder = towers
    state = load_file(folder / "model.safetensors")
    del state["text.norm.bias"]
    save_file(state | {"extra": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing all of .*; missing text.norm.bias; unexpected extra; fresh="):
        XVLM.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"model.safetensors: missing text.norm.bias; unexpected extra$"):
        XVLM.from_pretrained(folder, fresh=LACKING)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"<!DOCTYPE html><html>", "a web page, not a checkpoint"),
        (b"version https://git-lfs.github.com/spec/v1", "a Git LFS pointer"),
        (b"\0" * 100, "damaged or no checkpoint"),
    ],
)
def test_weights_that_are_something_else_are_refused(tmp_path, content, why):
    tiny.model().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=rf"model.safetensors: .*{why}"):
        XVLM.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model.safetensors"):
        XVLM.from_pretrained(tmp_path)


def test_half_precision_folders(tmp_path):
    model = tiny.model()
    model.save_pretrained(tmp_path, dtype=torch.float16)
    again = XVLM.from_pretrained(tmp_path)
    assert again.temperature.dtype == torch.float32
    torch.testing.assert_close(again.text.words.weight, model.text.words.weight, atol=1e-3, rtol=1e-3)


def test_weights_that_are_not_finite_are_named(tmp_path):
    tiny.model().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["text.norm.bias"][3] = torch.nan
    state["box_head.0.weight"][0, 0] = torch.inf
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"box_head.0.weight holds NaN or infinite values; text.norm.bias holds NaN"):
        XVLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("pooling", ["hard", "soft"])
def test_regions_of_one_image_in_one_pass_in_chunks_and_in_batches_agree(pooling):
    vision = tiny.VISION.model_copy(update={"pooling": pooling})
    model, batch = tiny.model(tiny.CONFIG.model_copy(update={"vision": vision})), tiny.batch()
    corner = torch.rand(3000, 2) * 24
    many = torch.cat([corner, corner + 1 + torch.rand(3000, 2) * 7], 1)
    together = model.embed_regions(batch.images[0], many)
    assert together.shape == (3000, 8)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(3000))
    in_chunks = torch.cat([model.embed_regions(batch.images[0], chunk) for chunk in many.split(700)])
    torch.testing.assert_close(in_chunks, together, atol=1e-6, rtol=1e-5)
    # The path that training takes: several images, and the patches gathered for each of their regions.
    regions = Regions(
        torch.zeros(50, dtype=torch.long),
        boxes.xyxy_to_cxcywh(many[:50] / 32),
        boxes.xyxy_to_xywh(many[:50]),
        torch.zeros(50, dtype=torch.bool),
    )
    concepts = model.encode_image(batch.images, regions)
    torch.testing.assert_close(model.embed_image(concepts)[3:], together[:50], atol=1e-6, rtol=1e-5)
    assert model.embed_regions(batch.images[0], many[:0]).shape == (0, 8)


def test_the_trunk_sees_the_image_once_however_many_boxes(monkeypatch):
    model, calls = tiny.model(), []
    forward = model.vision.trunk.forward_features
    monkeypatch.setattr(model.vision.trunk, "forward_features", lambda x: calls.append(x.shape) or forward(x))
    model.embed_regions(torch.zeros(3, 32, 32), torch.tensor([[0.0, 0, 8, 8], [3, 4, 30, 9]]).repeat(2000, 1))
    assert calls == [(1, 3, 32, 32)]


@pytest.mark.parametrize("pooling", ["hard", "soft"])
@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_a_box_within_a_patch_is_that_patch_and_an_edge_on_a_border_touches_no_other(pooling, size):
    vision = tiny.VISION.model_copy(update={"image_size": size, "pooling": pooling})
    model = tiny.model(tiny.CONFIG.model_copy(update={"vision": vision}))
    image = torch.randn(3, *size)
    concepts = model.encode_image(image[None])
    columns = concepts.grid[1]
    alone = torch.nn.functional.normalize(model.image_projection(concepts.patches[0]), dim=-1)
    found = model.embed_regions(image, torch.tensor([[17.25, 9.5, 17.5, 10.0], [16, 8, 24, 16], [16.5, 0.5, 23, 7]]))
    torch.testing.assert_close(found, alone[[columns + 2, columns + 2, 2]], atol=1e-5, rtol=1e-5)


def test_words_of_another_tokenizer_are_refused():
    ids = torch.tensor([[2, 7, 60]])
    with pytest.raises(ValueError, match=r"word 60 of a model with 60 words: the tokenizer and the model do not"):
        tiny.model().encode_text(Texts(ids, torch.ones_like(ids, dtype=torch.bool)))


def test_the_region_that_covers_an_image_is_the_image():
    model, batch = tiny.model(), tiny.batch()
    region = model.embed_regions(batch.images[1], torch.tensor([[0.0, 0.0, 32.0, 32.0]]))
    image = model.embed_image(model.encode_image(batch.images[1:2]))
    torch.testing.assert_close(region, image, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "wrong", [[8.0, 8, 8, 16], [9, 8, 8, 16], [0, 0, 32.5, 8], [-1, 0, 8, 8], [0, 0, float("nan"), 8]]
)
def test_boxes_outside_the_image_or_without_area_are_refused(wrong):
    given = torch.tensor([[0.0, 0, 8, 8], wrong, wrong])
    with pytest.raises(ValueError, match=r"2 of 3 boxes leave the image of 32 x 32 pixels or have no area.* is box 1"):
        tiny.model().embed_regions(torch.zeros(3, 32, 32), given)


def test_an_unknown_name_lists_what_there_is():
    with pytest.raises(FileNotFoundError, match="no such folder; shipped weights"):
        XVLM.from_pretrained("xvlm-nonesuch")


def test_mean_pooled_texts():
    model, batch = tiny.model(tiny.CONFIG.model_copy(update={"text_pooling": "mean"})), tiny.batch()
    words = model.encode_text(batch.texts)
    expected = torch.stack([row[mask].mean(0) for row, mask in zip(words.padded(), words.mask, strict=True)])
    torch.testing.assert_close(words.mean, expected)
    torch.testing.assert_close(model.embed_text(words), torch.nn.functional.normalize(model.text_projection(expected)))
