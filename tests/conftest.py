import pytest
from hypothesis import settings
from jaxtyping import config

# Nothing random without a seed, and no test fails because the machine was busy.
settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")


@pytest.fixture
def _as_a_user(monkeypatch):
    """No shape checks, as outside tests: wrong tensors meet the messages that users get."""
    monkeypatch.setattr(config, "jaxtyping_disable", True)
