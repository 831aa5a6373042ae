"""README and docs say what is true: their Python runs, their commands, options, targets and paths exist."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from xvlm.__main__ import app
from xvlm.data import scenes

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_RUN = re.compile(r"<!-- not run: \S.* -->")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


class Block(NamedTuple):
    language: str
    line: int  # of its first line of code, from 1
    code: str
    skipped: bool


def blocks(text: str) -> list[Block]:
    """Fenced blocks; one is skipped when the last line with anything on it before the fence says that it is not run."""
    found: list[Block] = []
    language, first, before = None, 0, ""
    code: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        if language is None and line.startswith("```"):
            language, first, code = line[3:].strip(), number + 1, []
        elif language is not None and line.startswith("```"):
            found.append(Block(language, first, "\n".join(code) + "\n", bool(NOT_RUN.fullmatch(before.strip()))))
            language, before = None, ""
        elif language is not None:
            code.append(line)
        elif line.strip():
            before = line
    assert language is None, f"the block at line {first} does not end"
    return found


def shell_lines(text: str) -> list[list[str]]:
    """Words of each command in shell blocks and in inline code, without comments and variables set before them."""
    shell = [block.code for block in blocks(text) if block.language in ("bash", "sh")]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    inline = [code.replace("\n", " ") for code in re.findall(r"`([^`]+)`", prose) if re.match(r"(xvlm|make) ", code)]
    commands = []
    for line in [*"\n".join(shell).replace("\\\n", " ").splitlines(), *inline]:
        words = shlex.split(line.removeprefix("$ "), comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words.pop(0)
        commands += [words] if words else []
    return commands


def unknown_words(words: list[str]) -> list[str]:
    """Subcommands and options of an ``xvlm`` command that there are not."""
    command, rest = typer.main.get_command(app), words[1:]
    while hasattr(command, "commands"):
        if not rest or rest[0].startswith("-"):
            break
        if rest[0] not in command.commands:
            return [rest[0]]
        command, rest = command.commands[rest[0]], rest[1:]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    return [word for word in rest if word.startswith("--") and word.partition("=")[0] not in {*known, "--help"}]


def targets(makefile: str) -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):(?!=)", makefile, flags=re.MULTILINE))


def absent_paths(text: str, folder: Path) -> list[str]:
    """Paths of the repository that are mentioned or linked to and match nothing; ``folder`` is where links begin."""
    mentioned = re.findall(r"(?<![\w./-])(?:configs|xvlm|pretrain|tests)/[\w./*-]*", text)
    absent = [path for path in (path.rstrip(".") for path in mentioned) if not list(ROOT.glob(path.rstrip("/")))]
    links = re.findall(r"\]\((?!https?://|#)([^)#\s]+)[^)]*\)", text)
    return absent + [link for link in links if not (folder / link).exists()]


def python_of(text: str) -> str:
    """One script of a page's Python blocks, each line at its place on the page, so that tracebacks point into it."""
    lines = [""] * (len(text.splitlines()) + 1)
    for block in blocks(text):
        if block.language == "python" and not block.skipped:
            code = block.code.splitlines()
            lines[block.line - 1 : block.line - 1 + len(code)] = code
    return "\n".join(lines)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if "```python" in page.read_text(encoding="utf-8")], ids=lambda page: page.name
)
def test_python_blocks_run(page, tmp_path):
    if page.name != "README.md":  # which makes it
        picture(tmp_path)
    script = tmp_path / f"{page.stem}.py"
    script.write_text(python_of(page.read_text(encoding="utf-8")), encoding="utf-8")
    run_python(script)
    made = [f"{each.name}/" if each.is_dir() else each.name for each in tmp_path.iterdir() if each != script]
    ask = ["git", "-C", str(ROOT), "check-ignore", "--no-index", *made]
    if (ROOT / ".git").exists():
        assert set(subprocess.run(ask, capture_output=True, text=True, check=False).stdout.split()) == set(made)


def test_weights_are_loaded_by_a_block_of_its_own(tmp_path):
    picture(tmp_path)
    script = tmp_path / "block.py"
    script.write_text(next(b.code for b in blocks((ROOT / "README.md").read_text()) if "embed_regions" in b.code))
    run_python(script)


def picture(folder: Path) -> None:
    scene = scenes.sample_scene(scenes.SceneConfig(), "test", 0)
    Image.fromarray(scenes.draw(scene, 128)).save(folder / "scene.png")


def run_python(script: Path) -> None:
    # A process of its own: what other tests imported must not make up for an import that the page lacks.
    ran = subprocess.run([sys.executable, str(script)], cwd=script.parent, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


@each_page
def test_commands_exist(page):
    made = targets((ROOT / "Makefile").read_text(encoding="utf-8"))
    for words in shell_lines(page.read_text(encoding="utf-8")):
        if words[0] == "xvlm":
            assert not unknown_words(words), words
        if words[0] == "make":
            wanted = [word for word in words[1:] if "=" not in word and not word.startswith("-")]
            assert set(wanted) <= made, words


@each_page
def test_paths_exist(page):
    assert not absent_paths(page.read_text(encoding="utf-8"), page.parent)


def test_the_readme_shows_what_its_command_prints(tmp_path, monkeypatch):
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    command, shown = re.search(r"```sh\n(xvlm ground .*)\n```\n+```text\n(.*?)```", page, flags=re.DOTALL).groups()
    monkeypatch.chdir(tmp_path)
    _, jpeg = next(scenes.samples(scenes.SceneConfig(size=128), "test", 1))  # as docs/data.md makes it
    Path("scene.png").write_bytes(jpeg)
    printed = CliRunner().invoke(app, shlex.split(command)[1:]).stdout
    number = r"\d+(?:\.\d+)?"
    assert re.sub(number, "#", printed) == re.sub(number, "#", shown)
    assert "  there (" in shown and "  not there (" in shown
    for ours, theirs in zip(re.findall(number, printed), re.findall(number, shown), strict=True):
        assert float(ours) == pytest.approx(float(theirs), abs=0.02 if "." in theirs else 1)  # another machine rounds


SAMPLE = """
```python
a = 1
```
<!-- not run: needs a network -->

```python
raise KeyError
```
Say `make demo`, or `xvlm data
pack x`; `xvlm.boxes` is a module.
```sh
$ VENV=x make test  # and wait
xvlm data show \\
  --count 3
```
See configs/pretrain/*.yaml, [this](absent.md#part) and https://example.org/xvlm/absent.py or xvlm/absent.py.
"""


def test_the_checks_find_what_a_page_says():
    first, second, shell = blocks(SAMPLE)
    assert (first.language, first.line, first.code, first.skipped) == ("python", 3, "a = 1\n", False)
    assert (second.skipped, shell.skipped) == (True, False)
    assert python_of(SAMPLE).split() == ["a", "=", "1"]
    assert python_of(SAMPLE).splitlines()[2] == "a = 1"
    expected = ["make test", "xvlm data show --count 3", "make demo", "xvlm data pack x"]
    assert [" ".join(words) for words in shell_lines(SAMPLE)] == expected
    assert unknown_words(["xvlm", "data", "show", "x", "--count", "3"]) == []
    assert unknown_words(["xvlm", "data", "show", "--counts=3"]) == ["--counts=3"]
    assert unknown_words(["xvlm", "dat", "show"]) == ["dat"]
    assert unknown_words(["xvlm", "data", "shw"]) == ["shw"]
    assert targets("A := 1\n.PHONY: x\ndemo: $(B)/x\n\ttouch: $@\n") == {"demo"}
    assert absent_paths(SAMPLE, ROOT) == ["xvlm/absent.py", "absent.md"]
