"""What every test gets: markers that skip themselves, reproducible properties, optional data."""

import importlib.util
import os
from pathlib import Path

import hypothesis
import pytest

EXTRAS = {"torch": "torch", "hub": "huggingface_hub", "plots": "matplotlib"}  # marker -> the module that the tests need
ROOT = Path(__file__).resolve().parents[1]

# No deadline: a busy machine is not a failure. Derandomized: a red run can be repeated.
hypothesis.settings.register_profile("vitq", deadline=None, derandomize=True)
hypothesis.settings.load_profile("vitq")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked as needing an extra that is not installed."""
    for extra in (extra for extra, module in EXTRAS.items() if importlib.util.find_spec(module) is None):
        for item in items:
            if item.get_closest_marker(extra):
                item.add_marker(pytest.mark.skip(reason=f"needs the {extra} extra: make setup-torch"))


@pytest.fixture(scope="session")
def optional_data() -> Path:
    """The folder of optional data: ``VITQ_SHARED``, else a folder ``shared`` beside the repository; skips when absent."""
    folder = Path(os.environ.get("VITQ_SHARED") or ROOT.parent / "shared")
    if not folder.is_dir():
        pytest.skip("no optional data: set VITQ_SHARED to its folder")
    return folder
