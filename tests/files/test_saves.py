"Saves that follow each other"
from everywhere import Everywhere
from learnkit.files.saves import save_next

store = Everywhere('files')


# Saves that follow each other share the code

def test_saves_are_listed_once(folder, monkeypatch):
    listed, saves = [], store.list_saves
    monkeypatch.setattr(store, 'list_saves', lambda folder: listed.append(1) or saves(folder))
    for i in range(1, 4):
        save_next(i, folder)
        assert len(listed) == i
    assert [path.name
            for path in saves(folder)] == ['save-000003.safetensors', 'save-000002.safetensors']
