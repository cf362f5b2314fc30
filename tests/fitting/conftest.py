"""One random critic for all tests, and its scorer."""

import pytest

from tests.scoring.scoring_models import critic
from vhead import Scorer


@pytest.fixture(scope="session")
def model():
    return critic()


@pytest.fixture(scope="session")
def scorer(model):
    return Scorer(model)
