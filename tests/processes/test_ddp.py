"Options of torch's DistributedDataParallel"
import pytest
import shards
from learnkit.processes import launch as launching
from learnkit.processes.launch import launch


def test_a_static_graph_and_accumulated_gradients_exclude_each_other(monkeypatch):
    monkeypatch.setattr(launching, 'n_threads', lambda: 1)  # copies, which begin at once
    with pytest.raises(RuntimeError, match='static_graph=True.*leave one of the two out'):
        launch(shards.static, 2, n=2)
    assert launch(shards.static, 1, n=2) == [12, 12]
