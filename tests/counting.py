"What tests of checkpoints count"
from learnkit import Callback


class Fits(Callback):
    "Counts the training batches that are really computed"
    order, n = 99, 0
    def settings(self): return None
    def before_batch(self, learn):
        if learn.phase == 'train': Fits.n += 1
