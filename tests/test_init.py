"""Which layers of a BERT become which of ours."""

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    CamembertConfig,
    CamembertModel,
    DistilBertConfig,
    DistilBertModel,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaModel,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
    XLMRobertaModel,
)

from xvlm.models import resize
from xvlm.models.init import InitConfig, initial_model

LAYERS = 4


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A BERT of four layers as transformers saves it, and the folder it is in."""
    torch.manual_seed(0)
    shape = {"vocab_size": 60, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    made = BertModel(BertConfig(**shape, num_hidden_layers=LAYERS, max_position_embeddings=16)).eval()
    folder = tmp_path_factory.mktemp("bert")
    made.save_pretrained(folder)
    return made, folder


def ours(folder, text_layers, cross_layers):
    text = tiny.TEXT.model_copy(update={"text_layers": text_layers, "cross_layers": cross_layers})
    return initial_model(tiny.CONFIG.model_copy(update={"text": text}), InitConfig(text=str(folder)))


@pytest.mark.parametrize(("text_layers", "cross_layers"), [(2, 2), (3, 1), (4, 2), (4, 4)])
def test_the_first_layers_read_and_the_last_fuse(bert, text_layers, cross_layers):
    theirs, folder = bert
    model, fresh = ours(folder, text_layers, cross_layers)
    first = theirs.encoder.layer[:text_layers]
    last = theirs.encoder.layer[LAYERS - cross_layers :]
    for mine, layer in zip([*model.text.layers, *model.cross.layers], [*first, *last], strict=True):
        assert torch.equal(mine.expand.weight, layer.intermediate.dense.weight)
        assert torch.equal(mine.attention.key.bias, layer.attention.self.key.bias)
    assert "cross.layers.0.cross_attention.query.weight" in fresh and "image_projection.bias" in fresh
    assert not any(name.startswith("text.") or name.endswith("expand.weight") for name in fresh)


def test_a_text_encoder_of_all_layers_is_bert(bert):
    theirs, folder = bert
    texts = tiny.texts(3, torch.Generator().manual_seed(0))
    model, _ = ours(folder, LAYERS, 2)
    with torch.no_grad():
        expected = theirs(texts.ids, attention_mask=texts.mask.long()).last_hidden_state[texts.mask]
        torch.testing.assert_close(model.eval().encode_text(texts).states, expected, atol=1e-5, rtol=1e-5)


def test_roberta_starts_counting_positions_behind_its_padding_id(tmp_path):
    shape = {"vocab_size": 60, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    shape |= {"max_position_embeddings": 18, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
    theirs = RobertaForMaskedLM(RobertaConfig(**shape, num_hidden_layers=LAYERS)).eval()
    theirs.save_pretrained(tmp_path)
    changes = {"text_layers": LAYERS, "max_positions": 18, "token_types": 1, "norm_eps": 1e-5}
    text = tiny.TEXT.model_copy(update=changes | {"position_offset": 2})
    model, fresh = initial_model(tiny.CONFIG.model_copy(update={"text": text}), InitConfig(text=str(tmp_path)))
    assert not any(name.startswith(("text.", "word_head.")) for name in fresh)
    texts = tiny.texts(3, torch.Generator().manual_seed(0))
    ids = torch.where(texts.mask, texts.ids, 1)  # RoBERTa tells padding by its id
    with torch.no_grad():
        expected = theirs(ids, attention_mask=texts.mask.long(), output_hidden_states=True)
        words = model.eval().encode_text(texts)
        torch.testing.assert_close(words.states, expected.hidden_states[-1][texts.mask], atol=1e-5, rtol=1e-5)
        guesses = model.guess_words(words.states)
        torch.testing.assert_close(guesses, expected.logits[texts.mask], atol=1e-5, rtol=1e-5)

    wrong = tiny.CONFIG.model_copy(update={"text": tiny.TEXT.model_copy(update=changes)})
    with pytest.raises(ValueError, match=r"first word has position 2, but model\.text\.position_offset is 0"):
        initial_model(wrong, InitConfig(text=str(tmp_path)))


@pytest.mark.parametrize(("text_layers", "cross_layers"), [(1, 2), (5, 2), (2, 5)])
def test_layers_that_would_be_left_out_or_missing_are_an_error(bert, text_layers, cross_layers):
    with pytest.raises(ValueError, match=f"4 layers .* asks for {text_layers} \\+ {cross_layers}"):
        ours(bert[1], text_layers, cross_layers)


def save(folder, **changes):
    made = tiny.model(tiny.CONFIG.model_copy(update=changes))
    made.save_pretrained(folder)
    return made


def test_a_task_takes_the_heads_it_has_a_use_for(tmp_path):
    before = save(tmp_path)
    config = tiny.CONFIG.model_copy(update={"heads": ("box_head", "truth_head")})
    model, fresh = initial_model(config, InitConfig(model=str(tmp_path)))
    assert not hasattr(model, "itm_head") and not hasattr(model, "temperature")
    assert fresh == [name for name, _ in model.named_parameters() if name.startswith("truth_head.")]
    for name, tensor in before.state_dict().items():
        assert name not in model.state_dict() or torch.equal(model.state_dict()[name], tensor)


def test_a_second_look_starts_as_a_copy_and_stays_its_own(tmp_path):
    before = save(tmp_path / "one")
    text = tiny.TEXT.model_copy(update={"looks": 2})
    config = tiny.CONFIG.model_copy(update={"text": text})
    model, fresh = initial_model(config, InitConfig(model=str(tmp_path / "one")))
    assert fresh == [] and len(model.cross.layers) == 2 * len(before.cross.layers)
    for number, layer in enumerate(model.cross.layers):
        origin = before.cross.layers[number // 2].state_dict()
        assert len(layer.state_dict()) == len(origin) - (4 if number % 2 else 0)
        assert all(torch.equal(tensor, origin[name]) for name, tensor in layer.state_dict().items())

    torch.nn.init.zeros_(model.cross.layers[1].expand.weight)
    model.save_pretrained(tmp_path / "two")
    again, _ = initial_model(config, InitConfig(model=str(tmp_path / "two")))
    assert not again.cross.layers[1].expand.weight.any() and again.cross.layers[0].expand.weight.any()
    with pytest.raises(ValueError, match=r"'looks': 2.*'looks': 1"):
        initial_model(tiny.CONFIG, InitConfig(model=str(tmp_path / "two")))


def test_another_shape_is_still_refused(tmp_path):
    save(tmp_path)
    config = tiny.CONFIG.model_copy(update={"embed_dim": 4, "heads": ("box_head",)})
    with pytest.raises(ValueError, match="embed_dim: 8 and 4"):
        initial_model(config, InitConfig(model=str(tmp_path)))


def at(size, **options):
    """The tiny configuration for another image size, its trunk with other options."""
    vision = tiny.VISION.model_copy(update={"image_size": size, "options": tiny.SWIN | options})
    return tiny.CONFIG.model_copy(update={"vision": vision})


def test_another_image_size_resizes_the_tables_of_larger_windows_and_says_so(tmp_path, caplog):
    before = save(tmp_path).state_dict()
    model, fresh = initial_model(at((48, 48), window_size=6), InitConfig(model=str(tmp_path)))
    assert fresh == []
    assert "from 32 x 32 to 48 x 48 pixels, 2 position tables resized" in caplog.text
    for name, tensor in model.state_dict().items():
        is_table = name.endswith("relative_position_bias_table")
        assert torch.equal(tensor, resize.relative_positions(before[name], 6) if is_table else before[name])
    assert model.encode_image(torch.randn(1, 3, 48, 48)).grid == (6, 6)

    model, _ = initial_model(at((32, 64)), InitConfig(model=str(tmp_path)))  # windows as they were
    assert "from 32 x 32 to 32 x 64 pixels, 0 position tables resized" in caplog.text
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


VIT = {"embed_dim": 24, "depth": 2, "num_heads": 2}


@pytest.mark.parametrize(
    ("trunk", "options", "positions", "tables"),
    [
        ("vit_tiny_patch16_224", VIT, False, ["vision.trunk.pos_embed"]),
        ("vit_medium_patch16_reg4_gap_256", VIT, False, ["vision.trunk.pos_embed"]),
        ("vit_small_patch16_dinov3", VIT, False, []),  # positions turn its queries, no table holds them
        ("vit_tiny_patch16_224", VIT, True, ["vision.positions", "vision.trunk.pos_embed"]),
        ("test_efficientnet", {}, True, ["vision.positions"]),
    ],
)
@pytest.mark.parametrize("size", [(96, 96), (32, 96)])
def test_absolute_positions_follow_the_grid(trunk, options, positions, tables, size, tmp_path):
    shape = {"trunk": trunk, "options": options, "positions": positions}
    known, wanted = (tiny.VISION.model_copy(update=shape | {"image_size": each}) for each in ((64, 96), size))
    before = save(tmp_path, vision=known)
    config = tiny.CONFIG.model_copy(update={"vision": wanted})
    model, _ = initial_model(config, InitConfig(model=str(tmp_path)))
    for name, tensor in model.state_dict().items():
        known = before.state_dict()[name]
        if name in tables:
            known = resize.absolute_positions(known, before.vision.grid, model.vision.grid)
        assert torch.equal(tensor, known), name
    assert {name for name, t in before.state_dict().items() if t.shape != model.state_dict()[name].shape} == set(tables)


def test_what_another_image_size_does_not_explain_is_refused(tmp_path):
    save(tmp_path / "swin")
    with pytest.raises(ValueError, match=r"differs from model: vision: .*'window_size': 4.*'window_size': 2"):
        initial_model(at((32, 32), window_size=2), InitConfig(model=str(tmp_path / "swin")))
    with pytest.raises(ValueError, match=r"differs from model: vision: .*'embed_dim': 8.*'embed_dim': 16"):
        initial_model(at((48, 48), embed_dim=16), InitConfig(model=str(tmp_path / "swin")))
    with pytest.raises(ValueError, match=r"does not take images of 36 x 48 pixels"):
        initial_model(at((36, 48)), InitConfig(model=str(tmp_path / "swin")))
    hiera = {"trunk": "hiera_tiny_224", "options": {"embed_dim": 8, "num_heads": 1, "stages": [1] * 4}}
    known, wanted = (tiny.VISION.model_copy(update=hiera | {"image_size": each}) for each in ((64, 64), (96, 96)))
    save(tmp_path / "hiera", vision=known)  # its positions are of smaller patches than those it ends with
    with pytest.raises(ValueError, match=r"trunk\.pos_embed has shape .*, expected"):
        initial_model(tiny.CONFIG.model_copy(update={"vision": wanted}), InitConfig(model=str(tmp_path / "hiera")))


def test_towers_alone_start_a_model_whose_other_parts_are_named(tmp_path):
    before = save(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({name: t for name, t in load_file(file).items() if name.startswith(("vision.", "text."))}, file)
    lacking = sorted({name.partition(".")[0] for name in before.state_dict()} - {"vision", "text"})
    with pytest.raises(ValueError, match=r"missing all of box_head, cross, .*; fresh="):
        initial_model(tiny.CONFIG, InitConfig(model=str(tmp_path)))
    model, fresh = initial_model(tiny.CONFIG, InitConfig(model=str(tmp_path), fresh=lacking))
    assert fresh == [name for name, _ in model.named_parameters() if not name.startswith(("vision.", "text."))]
    assert torch.equal(model.text.words.weight, before.text.words.weight)
    with pytest.raises(ValueError, match=r"there is no init\.model"):
        initial_model(tiny.CONFIG, InitConfig(fresh=["cross"]))


SHAPE = {"vocab_size": 60, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
# After fairseq's habits: positions start behind the padding id 1, one token type, another epsilon.
FAIRSEQ = {"max_position_embeddings": 18, "type_vocab_size": 1, "layer_norm_eps": 1e-5, "pad_token_id": 1}
# MiniLM: more layers, narrow; the sentence encoders among them are saved without a pooler.
KINDS = {
    "bert": (BertForMaskedLM, BertConfig, {"max_position_embeddings": 16}),
    "minilm": (BertModel, BertConfig, {"max_position_embeddings": 16, "num_hidden_layers": 6}),
    "roberta": (RobertaModel, RobertaConfig, FAIRSEQ),
    "xlm-r": (XLMRobertaModel, XLMRobertaConfig, FAIRSEQ),
    "xlm-r with its word head": (XLMRobertaForMaskedLM, XLMRobertaConfig, FAIRSEQ),
    "camembert": (CamembertModel, CamembertConfig, FAIRSEQ),
}


def saved(kind, folder):
    """A small model of a kind as transformers saves it, and the shape of ours."""
    make, config, changes = KINDS[kind]
    extra = {"add_pooling_layer": False} if kind == "minilm" else {}
    theirs = make(config(**SHAPE, **{"num_hidden_layers": LAYERS} | changes), **extra).eval()
    theirs.save_pretrained(folder)
    shape = {"max_positions": changes["max_position_embeddings"], "norm_eps": theirs.config.layer_norm_eps}
    shape |= {"token_types": theirs.config.type_vocab_size, "position_offset": 2 if changes is FAIRSEQ else 0}
    return theirs, tiny.TEXT.model_copy(update=shape)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cross_layers", [1, 2])
def test_the_lower_half_gives_the_hidden_states_of_transformers(kind, cross_layers, tmp_path):
    theirs, text = saved(kind, tmp_path)
    text_layers = theirs.config.num_hidden_layers - cross_layers
    text = text.model_copy(update={"text_layers": text_layers, "cross_layers": cross_layers})
    model, fresh = initial_model(tiny.CONFIG.model_copy(update={"text": text}), InitConfig(text=str(tmp_path)))
    has_head = theirs.get_output_embeddings() is not None
    assert any(name.startswith("word_head.") for name in fresh) != has_head
    texts = tiny.texts(3, torch.Generator().manual_seed(0))
    ids = torch.where(texts.mask, texts.ids, theirs.config.pad_token_id)
    with torch.no_grad():
        expected = theirs(ids, attention_mask=texts.mask.long(), output_hidden_states=True).hidden_states
        words = model.eval().encode_text(texts)
    torch.testing.assert_close(words.states, expected[text_layers][texts.mask], atol=1e-5, rtol=1e-5)
    upper = theirs.base_model.encoder.layer[text_layers:]
    for mine, layer in zip(model.cross.layers, upper, strict=True):
        assert torch.equal(mine.contract.weight, layer.output.dense.weight)


def test_a_pickled_checkpoint_is_read_too(tmp_path):
    theirs, text = saved("bert", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds neither model\.safetensors nor pytorch_model\.bin"):
        initial_model(tiny.CONFIG.model_copy(update={"text": text}), InitConfig(text=str(tmp_path)))
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    model, _ = initial_model(tiny.CONFIG.model_copy(update={"text": text}), InitConfig(text=str(tmp_path)))
    assert torch.equal(model.text.words.weight, theirs.get_input_embeddings().weight)


def test_towers_that_hold_nan_are_refused(tmp_path):
    theirs, text = saved("bert", tmp_path / "bert")
    config = tiny.CONFIG.model_copy(update={"text": text})
    theirs.state_dict()["bert.embeddings.LayerNorm.bias"][3] = torch.nan
    theirs.save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match=r"text\.norm\.bias holds NaN"):
        initial_model(config, InitConfig(text=str(tmp_path / "bert")))
    trunk = tiny.model().vision.trunk.state_dict()
    trunk["norm.bias"][0] = torch.inf
    save_file(trunk, tmp_path / "trunk.safetensors")
    with pytest.raises(ValueError, match=r"vision\.trunk\.norm\.bias holds NaN or infinite"):
        initial_model(tiny.CONFIG, InitConfig(vision=str(tmp_path / "trunk.safetensors")))


def test_what_would_load_and_give_other_numbers_is_an_error(tmp_path):
    _, text = saved("xlm-r", tmp_path / "a")
    wrong = tiny.CONFIG.model_copy(update={"text": text.model_copy(update={"norm_eps": 1e-12})})
    with pytest.raises(ValueError, match=r"made with norm_eps 1e-05, model\.text says 1e-12"):
        initial_model(wrong, InitConfig(text=str(tmp_path / "a")))
    DistilBertModel(DistilBertConfig(dim=16, n_heads=2, hidden_dim=32, n_layers=2)).save_pretrained(tmp_path / "b")
    with pytest.raises(ValueError, match=r"is a distilbert .*; expected one of bert, roberta, xlm-roberta"):
        initial_model(tiny.CONFIG, InitConfig(text=str(tmp_path / "b")))
    shape = SHAPE | {"hidden_act": "relu", "num_hidden_layers": LAYERS, "max_position_embeddings": 16}
    BertModel(BertConfig(**shape)).save_pretrained(tmp_path / "c")
    with pytest.raises(ValueError, match=r"is a bert with relu; expected .* with gelu"):
        initial_model(tiny.CONFIG, InitConfig(text=str(tmp_path / "c")))
