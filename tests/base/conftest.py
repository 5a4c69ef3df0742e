"An accelerator made up, for tests of devices and randomness"
from types import SimpleNamespace
import pytest
import torch
from files_helpers import state


class FakeAccelerator:
    "As much of torch.cuda as its generators need; counts what would start the device"
    def __init__(self, n=2):
        self.states, self.started, self.asked, self.seeded = [torch.zeros(2)] * n, False, 0, []
    def is_initialized(self): return self.started
    def device_count(self): return len(self.states)

    def get_rng_state(self, device):
        self.asked += 1
        return self.states[device].clone()

    def set_rng_state(self, state, device): self.states[device] = state.clone()
    def manual_seed_all(self, seed): self.seeded.append(seed)
    def draw(self): self.started, self.states = True, [state + 1 for state in self.states]


@pytest.fixture
def fake(monkeypatch):
    fake = FakeAccelerator()
    monkeypatch.setattr(torch.accelerator, 'is_available', lambda: True)
    monkeypatch.setattr(torch.accelerator, 'current_accelerator',
                        lambda: SimpleNamespace(type='cuda'))
    monkeypatch.setattr(torch.accelerator, 'current_device_index', lambda: 1)
    monkeypatch.setattr(torch, 'get_device_module', lambda kind: fake)
    return fake
