"""Fixtures: a tiny random Qwen2-VL, and a Trainer that writes nothing outside the test's folder."""

import os
import warnings
from functools import cache
from pathlib import Path

import pytest
import torch

# Two workers per core on small machines; the numbers in these tests are too small to gain from threads. In the
# environment too: where it says nothing, Lightning sets the number anew for some strategies, and rounding differs.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
warnings.filterwarnings("ignore", message=".*litlogger.*")
# Its asserts say what they found only if pytest rewrites them, as it does in test files.
pytest.register_assert_rewrite("tests.datamodule_checks")


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def tiny_policy(tmp_path_factory) -> str:
    """Folder of a Qwen2-VL of 0.2 M random parameters with tokenizer and processor."""
    from rft_lightning.policy.tiny import build_tiny, shapes_corpus

    folder = tmp_path_factory.mktemp("tiny") / "policy"
    build_tiny(folder, shapes_corpus(200), width=64, layers=2, vision_width=32, vision_layers=1)
    return str(folder)


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory):
    """family_folder(model_type) -> folder of a tiny random checkpoint of that family, built once."""
    from tests.tiny_families import build_family

    @cache
    def folder(model_type: str) -> str:
        return str(build_family(model_type, tmp_path_factory.mktemp("families") / model_type))

    return folder


@pytest.fixture
def sample_data() -> Path:
    """Folder of real sample data, where there is one."""
    folder = os.environ.get("RFT_SAMPLE_DATA")
    if not folder:
        pytest.skip("RFT_SAMPLE_DATA names no folder of sample data")
    return Path(folder)


@pytest.fixture
def make_trainer(tmp_path):
    """make_trainer(max_steps, **kwargs) -> Trainer on one CPU process, no loggers, checkpoints by `callbacks` only."""
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import Checkpoint

    def make(max_steps: int = 1, **kwargs):
        settings = {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": -1,
            "limit_val_batches": 0,
            "num_sanity_val_steps": 0,
            "logger": False,
            "enable_checkpointing": any(isinstance(callback, Checkpoint) for callback in kwargs.get("callbacks", [])),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "use_distributed_sampler": False,
            "log_every_n_steps": 1,
            "default_root_dir": tmp_path,
        }
        return Trainer(max_steps=max_steps, **{**settings, **kwargs})

    return make


@pytest.fixture(autouse=True)
def end_group():
    """No test finds the process group of an earlier one."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture
def leave_no_group():
    """Lightning keeps the process group and its environment variables until the process ends."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
