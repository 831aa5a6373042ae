"""The ``xvlm`` command."""

import sys

import typer

from xvlm.commands import bench, checkout, data, grounding, vectors, weights
from xvlm.config import ConfigError
from xvlm.data.shards import BrokenSample

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
for group in (checkout, grounding, vectors, weights):
    app.add_typer(group.app)
app.add_typer(data.app, name="data")
app.add_typer(bench.app, name="bench")


def main() -> None:
    try:
        app()
    except (ConfigError, ValueError, OSError, BrokenSample) as error:
        named = isinstance(error, OSError) and error.errno is not None and error.filename is not None
        sys.exit(f"error: {error.filename}: {error.strerror}" if named else f"error: {error}")


if __name__ == "__main__":
    main()
