"Mistakes that a type checker finds, each in a line that ends with `# wrong`"
from torch import nn
from learnkit import *

dls = DataLoaders([1])
learn = Learner(dls, nn.Linear(1, 1), nun_epochs=3) # wrong
learn = Learner(dls, nn.Linear(1, 1))
learn.fitt(3) # wrong
learn.fit(3, n_stepps=3) # wrong
learn.lr_find().vally # wrong
learn.recorder.fd # wrong
learn.get_preds(with_inputs=True) # wrong
dls.from_tensor([1]) # wrong
DataLoaders([1], device='cpu') # wrong
SaveBest(metric='accuracy') # wrong
EarlyStopping(patience='long') # wrong
CheckpointedLearner(dls, nn.Linear(1, 1)) # wrong
kept = CheckpointedLearner(dls, nn.Linear(1, 1), name='a', on_changes='rerun') # wrong
kept = CheckpointedLearner(dls, nn.Linear(1, 1), name='a')
with kept.checkpoint(1) as cp: cp.fit_one_cicle(3) # wrong
kept.cache(1).validat() # wrong
kept.rollback(1, 'best', calls=2) # wrong


class Wrong(Callback):
    def after_epoch(self, learn): learn.stopp() # wrong
