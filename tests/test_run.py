"""What every training script does around its task: how it ends."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from xvlm import distributed, run, train


@pytest.mark.parametrize(("rank", "status"), [(0, "stopped at step 3 of 6"), (1, 1)])
def test_of_several_processes_the_first_says_that_a_run_has_stopped(rank, status, monkeypatch):
    def stops(_):
        raise train.Interrupted("stopped at step 3 of 6")

    monkeypatch.setattr(distributed, "world", lambda: distributed.World(rank, 2))
    with pytest.raises(SystemExit) as ended:
        run.script(stops)
    assert ended.value.code == status


@pytest.mark.parametrize("printed", ["", "run.sys.stdout.flush()"])
def test_output_that_nobody_reads_ends_quietly(printed):
    """As `| head` does: the reader leaves, before or after what was printed is on its way."""
    read, write = os.pipe()
    os.close(read)
    command = f"from xvlm import run\ndef main(_):\n    print('numbers')\n    {printed}\nrun.script(main)"
    ran = subprocess.run(
        [sys.executable, "-c", command],
        stdout=write,
        stderr=subprocess.PIPE,
        cwd=Path(__file__).parents[1],
        check=False,
    )
    os.close(write)
    assert (ran.returncode, ran.stderr) == (1, b"")
