"""What every test file shares: the reason to skip tests that need a GPU."""

import pytest
import torch


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device: torch.cuda.is_available() is False"))

pytest_plugins = ["small"]  # the fixture `published`
