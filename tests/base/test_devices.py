"The device of a script that names none"
import torch
from learnkit.base.devices import default_device


def test_default_device(fake): assert default_device() == torch.device('cuda', 1)
