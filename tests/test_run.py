"""What every training script does around its task: how it ends."""

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
