"""Names to folders, and files that are either whole or not there."""

from pathlib import Path

import huggingface_hub
import pytest
import tiny
import torch
from transformers import BertConfig, BertModel

from xvlm import hub
from xvlm.data import scenes
from xvlm.data.processor import Processor, ProcessorConfig
from xvlm.models.init import InitConfig, initial_model
from xvlm.models.xvlm import XVLM


def test_paths_packages_and_shipped_names(tmp_path):
    assert hub.locate(tmp_path) == tmp_path
    assert hub.locate("package:xvlm/data").name == "data"
    with pytest.raises(FileNotFoundError, match=r"'no_such_package' is not installed .*\[photos\]"):
        hub.locate("package:no_such_package/x")
    with pytest.raises(FileNotFoundError, match="xvlm is installed, but has no 'nothing'"):
        hub.locate("package:xvlm/nothing")
    with pytest.raises(FileNotFoundError, match="nonesuch: no such folder; shipped weights"):
        hub.locate("nonesuch")


def test_a_hub_name_without_a_network_is_explained():
    with pytest.raises(FileNotFoundError, match=r"org/model: no such folder here, .* and the hub did not give it"):
        hub.locate("org/model")


def test_models_processors_and_text_towers_come_from_the_hub_by_name(tmp_path, monkeypatch):
    made, processor = tiny.model(), Processor.from_vocabulary(scenes.vocabulary(), ProcessorConfig())
    made.save_pretrained(tmp_path / "mine")
    processor.save_pretrained(tmp_path / "mine")
    shape = {"vocab_size": 60, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    bert = BertModel(BertConfig(**shape, num_hidden_layers=4, max_position_embeddings=16))
    bert.save_pretrained(tmp_path / "bert")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name: str(tmp_path / name.removeprefix("org/")))
    assert torch.equal(XVLM.from_pretrained("org/mine").text.words.weight, made.text.words.weight)
    assert Processor.from_pretrained("org/mine").vocab_size == processor.vocab_size
    started, _ = initial_model(tiny.CONFIG, InitConfig(text="org/bert"))
    assert torch.equal(started.text.words.weight, bert.embeddings.word_embeddings.weight)


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    file = tmp_path / "a.txt"
    hub.write_atomically(file, "old")
    with pytest.raises(KeyError), hub.replacing(file) as unfinished:
        unfinished.write_text("half")
        raise KeyError
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_two_who_write_a_file_do_not_disturb_each_other(tmp_path):
    with hub.replacing(tmp_path / "a.txt") as one, hub.replacing(tmp_path / "a.txt") as other:
        one.write_text("one")
        other.write_text("the other")
    assert (tmp_path / "a.txt").read_text() == "one"  # whose body ended last


class Api:
    """Stands for the hub: keeps what it is sent."""

    repositories: dict = {}
    cards: dict = {}  # what somebody wrote there, by repository

    def create_repo(self, name, *, private, exist_ok):
        assert exist_ok
        self.repositories.setdefault(name, (private, set()))
        return f"https://hub/{name}"

    def upload_folder(self, *, repo_id, folder_path, ignore_patterns):
        files = {file.name for file in Path(folder_path).iterdir()}
        self.repositories[repo_id][1].update(files - set(ignore_patterns or []))

    def file_exists(self, name, file):
        return name in self.cards

    def hf_hub_download(self, name, file):
        return self.cards[name]


def test_a_model_and_its_processor_share_a_repository(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert tiny.model().push_to_hub("org/mine", private=True) == "https://hub/org/mine"
    Processor.from_vocabulary(scenes.vocabulary(), ProcessorConfig()).push_to_hub("org/mine")
    private, files = Api.repositories["org/mine"]
    assert private
    assert {"config.json", "model.safetensors", "golden.safetensors", "processor.json", "tokenizer.json"} <= files
    assert "README.md" in files


def test_a_card_that_somebody_wrote_on_the_hub_stays(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    ours, theirs, folder = tmp_path / "ours.md", tmp_path / "theirs.md", tmp_path / "mine"
    ours.write_text(hub.signed("# Made"))
    theirs.write_text("# Written with care")
    Api.cards = {"org/theirs": theirs, "org/ours": ours}
    folder.mkdir()
    (folder / "README.md").write_text(hub.signed("# Made again"))
    for name, goes in (("org/theirs", False), ("org/ours", True), ("org/new", True)):
        hub.push(folder, name)
        assert ("README.md" in Api.repositories[name][1]) is goes
    assert "org/theirs: its README.md is kept" in caplog.text
    (folder / "README.md").write_text("# Written as well")
    hub.push(folder, "org/theirs")
    assert "README.md" in Api.repositories["org/theirs"][1]


def test_a_push_that_cannot_be_is_explained(tmp_path):
    with pytest.raises(NotADirectoryError, match="absent: no such folder"):
        hub.push(tmp_path / "absent", "org/mine")
    with pytest.raises(OSError, match=r"org/mine: not pushed to the hub: "):
        hub.push(tmp_path, "org/mine")  # the tests are offline
    with pytest.raises(OSError, match=r"a/b/c: not pushed to the hub: "):
        hub.push(tmp_path, "a/b/c")
