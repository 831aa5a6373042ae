"""The card of a folder of weights: what is known is said, what is not known too, and no hand's work is lost."""

import json

import pytest
import tiny
import yaml

from xvlm import hub, run
from xvlm.models.card import Card, text
from xvlm.models.decoder import Captioner

SECTIONS = ("Data", "Numbers", "Licence", "How it was made")


def parts(card: str) -> tuple[dict, dict[str, str]]:
    """The hub's header, and the text of each section."""
    _, header, body = card.split("---\n", 2)
    _, *sections = body.split("\n## ")
    return yaml.safe_load(header), {title: text.strip() for title, _, text in (s.partition("\n") for s in sections)}


def test_weights_saved_by_hand_say_what_is_not_known(tmp_path):
    tiny.model().save_pretrained(tmp_path / "mine")
    card = (tmp_path / "mine/README.md").read_text()
    header, said = parts(card)
    assert header == {"library_name": "xvlm", "license": "unknown", "tags": ["x-vlm", "vision-language"]}
    assert tuple(said) == SECTIONS
    assert said["Data"] == "Not stated." and said["How it was made"].startswith("Not stated.")
    assert said["Licence"].startswith("Not stated.") and said["Numbers"].startswith("None were handed over")
    parameters = sum(p.numel() for p in tiny.model().parameters())
    assert f"# mine\n\n{parameters:,} parameters, images of 32 x 32 pixels." in card
    assert 'XVLM.from_pretrained("mine")' in card


def test_what_is_known_is_said():
    known = Card(
        about="Stored as float16.",
        origin="By hand.",
        data="Photographs.",
        datasets=("coco",),
        languages=("en",),
        licence="BSD-3-Clause",
        numbers="Many.",
    )
    card = text(Captioner.of(tiny.model()), known, "org/mine")
    header, said = parts(card)
    assert (header["license"], header["datasets"], header["language"]) == ("bsd-3-clause", ["coco"], ["en"])
    assert said["Numbers"].startswith("Many.") and said["Data"] == "Photographs." and said["Licence"] == "BSD-3-Clause"
    assert "from xvlm.models.decoder import Captioner\n" in card and 'Captioner.from_pretrained("org/mine")' in card
    header, _ = parts(text(tiny.model(), Card(licence="Ask us."), "mine"))
    assert header["license"] == "other"


@pytest.mark.parametrize("edited", [False, True])
def test_a_card_written_or_edited_by_hand_is_kept(tmp_path, caplog, edited):
    model, file = tiny.model(), tmp_path / "README.md"
    model.save_pretrained(tmp_path, card=Card(data="Photographs."))
    assert hub.is_signed(file.read_text())
    before = file.read_text().replace("Photographs.", "Photographs of cats.") if edited else "# My model"
    file.write_text(before)
    model.save_pretrained(tmp_path)
    assert file.read_text() == before and f"{file}: kept, because it was written or edited by hand" in caplog.text
    file.unlink()
    model.save_pretrained(tmp_path)
    assert "Photographs" not in file.read_text()
    model.save_pretrained(tmp_path, card=Card(data="Drawings."))
    assert "Drawings." in file.read_text()


def test_a_run_hands_over_what_its_folder_tells(tmp_path):
    (tmp_path / "config.yaml").write_text("title: Mine\n")
    (tmp_path / "commits.txt").write_text("abc\ndef+\n")
    seen = {"caption/coco/images": 4000, "region/vg/de/objects": 7}
    lines = [{"step": 1, "seen": {}}, {"step": 2, "seen": seen}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    _, said = parts(text(tiny.model(), run.card(tmp_path), "mine"))
    assert "| commit | abc, def+ |" in said["How it was made"] and "title: Mine" in said["How it was made"]
    assert "| caption | coco | images | 4,000 |" in said["Data"] and "| region | vg/de | objects | 7 |" in said["Data"]
    assert run.card(tmp_path).datasets == ("coco", "vg/de")
    assert said["Numbers"].startswith("None were handed over")

    (tmp_path / "validation.jsonl").write_text('{"step": 2, "dev/acc": 0.25, "dev/chance_acc": 0.1}\n')
    _, said = parts(text(tiny.model(), run.card(tmp_path), "mine"))
    assert said["Numbers"].startswith("At step 2") and "| dev | acc | 0.250 | 0.100 |" in said["Numbers"]
    assert "chance_acc" not in said["Numbers"]

    (tmp_path / "results.json").write_text('{"commit": "def", "seed": 3, "a/untrained/iou": 0.1, "a/trained/iou": 0.5}')
    (tmp_path / "results-val.json").write_text('{"split": "val", "seed": 3, "numbers": {"acc": 0.75}}')
    _, said = parts(text(tiny.model(), run.card(tmp_path), "mine"))
    assert "| seed | 3 |" in said["How it was made"] and "| commit | def |" in said["How it was made"]
    assert said["Numbers"].startswith("At the end of the run")
    assert "| a | iou | 0.500 |" in said["Numbers"] and "| val | acc | 0.750 |" in said["Numbers"]
    assert "0.100" not in said["Numbers"] and "0.250" not in said["Numbers"]
