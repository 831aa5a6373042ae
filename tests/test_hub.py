"""Names to folders, and files that are either whole or not there."""

import pytest

from xvlm import hub


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


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    file = tmp_path / "a.txt"
    hub.write_atomically(file, "old")
    with pytest.raises(KeyError), hub.replacing(file) as unfinished:
        unfinished.write_text("half")
        raise KeyError
    assert file.read_text() == "old"


def test_the_card_names_scores_and_provenance():
    results = {"commit": "abc", "seed": 3, "seen/trained/mean_iou": 0.5, "seen/trained/chance_mean_iou": 0.1}
    card = hub.model_card("tiny", "10 parameters.", results, "steps: 3")
    assert "| commit | abc |" in card and "| seen | mean_iou | 0.500 |" in card and "steps: 3" in card
    assert "chance" not in card
