"""Scoring on many machines with Ray: data sets by Ray Data, and the server of `vhead serve` by Ray Serve.

It needs `pip install 'vhead[ray]'`, and `'vhead[ray,serve]'` for the server.
"""

from vhead.ray.batches import BatchScorer
from vhead.ray.datasets import Processor, ScorerProcessorConfig, build_processor, score_dataset
from vhead.ray.serving import build_app

__all__ = ["BatchScorer", "Processor", "ScorerProcessorConfig", "build_app", "build_processor", "score_dataset"]
