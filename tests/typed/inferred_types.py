"What a type checker knows of each value"
from pathlib import Path
from typing import assert_type
from torch import nn
from learnkit import *
from learnkit.components.callback import Callbacks

learn = Learner(DataLoaders([1]), nn.Linear(1, 1))
assert_type(learn.recorder, Recorder)
assert_type(learn.cbs, Callbacks)
assert_type(learn.path, Path)
assert_type(learn.epoch, int)
assert_type(learn.validate(), dict[str, float])
with learn.added_cbs(EMA()) as same: assert_type(same, Learner)


class Mine(CheckpointedLearner):
    def own(self) -> int: return 1


mine = Mine(DataLoaders([1]), nn.Linear(1, 1), name='mine')
assert_type(mine.cache(1).own(), int)
assert_type(mine.rollback(1), Mine)
with mine.checkpoint(1) as cp: assert_type(cp, Mine)


class Listens(Callback):
    def after_epoch(self, learn): assert_type(learn, Learner)
