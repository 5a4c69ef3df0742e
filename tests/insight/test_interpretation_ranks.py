"Several processes find what one finds"
import pytest
import ranks
from learnkit.processes.launch import launch
from test_distributed import alike


@pytest.mark.parametrize('n', [2, 3])
def test_several_processes_find_what_one_finds(n):
    one = ranks.interpreted()
    for found in one.values(): assert found['worst'] == found['same']
    assert one['shuffled 13']['by_dataset'] and one['shuffled 13']['index'] != list(range(13))
    for found in launch(ranks.interpreted, n=n): alike(one, found, 1e-6)
