"Plain tensors under their names"
import os
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from files_helpers import same
from learnkit.files.errors import UnstorableError
from learnkit.files.tensors import save_tensors


# Plain tensors

def test_plain_tensors(path):
    "Under their names, also when they share memory"
    x = torch.arange(6.)
    tensors = {'a': x, 'b': x, 'c': x[2:], 'd.e': x.reshape(2, 3).t(), 'é': torch.zeros(0),
               '0': x[0]}
    save_tensors(tensors, path, metadata={'a': 'é', 'b': '2'})
    assert same(tensors, {name: load_file(path)[name] for name in tensors})
    with safe_open(path, 'pt') as file: assert file.metadata() == {'a': 'é', 'b': '2'}
    with pytest.raises(FileExistsError): save_tensors(tensors, path, overwrite=False)
    assert load_file(save_tensors({}, path)) == {}


@pytest.mark.parametrize('tensors, metadata', [
    ({'a': 1}, None), ({'a': torch.eye(2).to_sparse()}, None), ({1: torch.ones(1)}, None),
    ({'\ud800': torch.ones(1)}, None), ({'__metadata__': torch.ones(1)}, None), ({}, {'a': 1}),
    ({}, {'a': '\ud800'})])
def test_plain_tensors_that_are_refused(path, tensors, metadata):
    with pytest.raises(UnstorableError): save_tensors(tensors, path, metadata=metadata)
    assert os.listdir(path.parent) == []
