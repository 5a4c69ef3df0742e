"Each test in a folder of its own, and without a network"
import logging
import pytest


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, value in {'WANDB_MODE': 'offline', 'WANDB_SILENT': 'true',
                        'MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR': 'false'}.items():
        monkeypatch.setenv(name, value)
    logging.getLogger('alembic').setLevel('ERROR')
