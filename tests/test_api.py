"""The public names: exactly these, each there, each documented."""

import inspect
import subprocess
import sys

import pytest

import xvlm

PUBLIC = [
    "Batch",
    "Grounded",
    "Grounder",
    "Processor",
    "XVLM",
    "XVLMConfig",
    "__version__",
    "boxes",
    "draw",
    "embed",
    "evaluate",
    "fit",
    "load_config",
    "losses",
    "metrics",
    "tasks",
]


def test_the_public_names_are_these():
    assert sorted(xvlm.__all__) == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_is_there_and_documented(name):
    public = getattr(xvlm, name)
    if inspect.isclass(public) or inspect.isroutine(public):
        assert public.__module__.startswith("xvlm.")
        assert inspect.getdoc(public)
        # A dataclass without a docstring is given its signature as one.
        assert not inspect.getdoc(public).startswith(f"{name}(")


def test_another_name_is_refused_with_the_public_ones():
    with pytest.raises(AttributeError, match=r"Grounderr.*Grounder"):
        _ = xvlm.Grounderr


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, xvlm; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "xvlm" in loaded
    assert not {"torch", "timm", "transformers", "accelerate"} & set(loaded)
