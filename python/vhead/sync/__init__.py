"""Weights handed from a trainer to its workers: whole, verified, small, or not at all.

A `Publisher` writes publications into a directory, and a `Follower` brings them into a model: everything is verified
before the first parameter is touched, and a failure leaves the old weights bit for bit.
"""

from typing import TYPE_CHECKING

from vhead.sync.exporting import export
from vhead.sync.follower import Follower
from vhead.sync.publications import Publication, collect, publications, verify
from vhead.sync.publisher import Publisher

if TYPE_CHECKING:
    from vhead.sync.callback import PublishCallback

__all__ = ["Follower", "Publication", "PublishCallback", "Publisher", "collect", "export", "publications", "verify"]


def __getattr__(name: str) -> object:
    if name == "PublishCallback":
        from vhead.sync.callback import PublishCallback  # imports transformers' Trainer

        return PublishCallback
    raise AttributeError(f"module 'vhead.sync' has no attribute {name!r}")
