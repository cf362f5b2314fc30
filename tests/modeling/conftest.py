"""What the tests of the wrapper share."""

import logging

import pytest


@pytest.fixture
def transformers_log(caplog):
    """transformers' records, which its loggers do not pass up to the root."""
    transformers_logger = logging.getLogger("transformers")
    transformers_logger.addHandler(caplog.handler)
    yield caplog
    transformers_logger.removeHandler(caplog.handler)
