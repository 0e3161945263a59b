"""What every test shares: hypothesis profiles, and the slow suites' markers, which stay out of a plain `pytest`."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent

# A property that is slow on a busy machine is not wrong, so no profile has a deadline.
hypothesis.settings.register_profile("dev", max_examples=100, deadline=None)
# CI must give the same answer for the same commit; elsewhere `full` is where new examples are sought.
hypothesis.settings.register_profile("ci", max_examples=100, deadline=None, derandomize=True)
hypothesis.settings.register_profile(
    "full",
    max_examples=1000,
    deadline=None,
    derandomize=os.environ.get("CI") == "true",
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)
# By hand, before a release: HYPOTHESIS_PROFILE=long python -m pytest -m slow_property -n 2
hypothesis.settings.register_profile(
    "long", hypothesis.settings.get_profile("full"), max_examples=10_000, derandomize=False
)
hypothesis.settings.load_profile(
    os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") == "true" else "dev")
)

# What tests check is not remembered for the user; tests/test_passed.py has memories of its own.
os.environ["GATEKEEPER_CACHE"] = "off"


def pytest_configure(config: pytest.Config) -> None:
    """Register the slow suites' markers; without -m their tests are left to `make test-full`."""
    suites = yaml.safe_load((ROOT / "tests" / "suites.yaml").read_text(encoding="utf-8"))["suites"]
    slow = [suite for suite in suites if "marker" in suite]
    for suite in slow:
        config.addinivalue_line("markers", f"{suite['marker']}: {suite['summary']} Run by `make test-full`.")
    if not config.option.markexpr:
        config.option.markexpr = " and ".join(f"not {suite['marker']}" for suite in slow)


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT
