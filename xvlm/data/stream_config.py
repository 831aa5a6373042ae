"""What a stream of batches reads, and what it makes of it."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from xvlm.config import Configured
from xvlm.data import tars
from xvlm.data.cache import Cache
from xvlm.data.transforms import AugmentConfig

Grain = Literal["caption", "region", "question", "statement"]
Kind = Literal["region", "object", "phrase", "expression"]
Kinds = Annotated[list[Kind], Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
Entries = Annotated[list[Annotated[str, BeforeValidator(str)]], Field(min_length=1)]


class SourceConfig(Configured):
    """A source of a mixture, with epochs of its own."""

    shards: Entries
    weight: Annotated[float, Field(gt=0)] = 1.0  # of its images, beside those of the other sources
    kinds: Kinds | None = None  # null: the stream's


class StreamConfig(Configured):
    """One stream of batches. Of ``augment``, a region stream has its own defaults: keep_box, colour.

    Questions and statements are what fine-tuning reads, see :mod:`xvlm.tasks.vqa` and :mod:`xvlm.tasks.nlvr`; of what
    is said below about texts, ``images``, ``max_regions`` and ``max_texts`` concern them.
    """

    shards: Entries | None = None  # packed folders, or tars: see xvlm/data/tars.py; read as one
    sources: dict[str, SourceConfig] | None = None  # instead of `shards`: several, mixed by weight
    cache: Cache = Cache()  # of tars that come from URLs and pipes
    grain: Grain
    images: Count  # of an update, over all processes
    max_regions: Count = 5  # texts of an image; its captions are among them, and come first
    max_texts: Count | None = None  # of an update, over all processes; more are dropped at random
    with_caption: bool = True  # in a region stream: what is said about the whole image too, where there is something
    captions: Literal["any", "first"] = "any"  # which of a record's captions; the first of a scene is complete
    max_captions: Count = 1  # of an image
    kinds: Kinds = ["region", "object", "phrase", "expression"]
    # adjectives before an object's label: one at random (X-VLM), all, or each with probability 1/2
    attributes: Literal["one", "all", "some"] = "one"
    augment: AugmentConfig = AugmentConfig()
    workers: Annotated[int, Field(ge=0)] = 2
    max_skipped_share: Annotated[float, Field(ge=0, le=1)] = 0.05

    @model_validator(mode="after")
    def shards_or_sources(self) -> "StreamConfig":
        if (self.shards is None) == (not self.sources):
            raise ValueError("give either shards (read as one) or sources (mixed by weight); the other one is null")
        return self

    @property
    def mixture(self) -> dict[str, SourceConfig]:
        """The sources by name; ``shards`` are one source without a name."""
        return self.sources or {"": SourceConfig(shards=self.shards)}

    @model_validator(mode="after")
    def captions_leave_room_for_regions(self) -> "StreamConfig":
        if self.grain == "region" and self.with_caption and 1 < self.max_regions <= self.max_captions:
            raise ValueError(
                f"max_captions {self.max_captions} leave no region among the {self.max_regions} texts of an image"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def regions_keep_their_boxes(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("grain") != "region":
            return values
        given = values.get("augment", {})
        if not isinstance(given, dict):
            return values
        return values | {"augment": {"crop": "keep_box", "randaugment": "colour"} | given}


def locate(config: StreamConfig) -> dict[str, list[Path]]:
    """The packed folders of each source; tars without an index get one: see :func:`xvlm.data.tars.locate`."""
    return {
        name: [tars.locate(entry, config.cache) for entry in source.shards] for name, source in config.mixture.items()
    }
