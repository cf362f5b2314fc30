"""Publications in the form that other engines read."""

from pathlib import Path
from typing import Literal

from vhead import _native
from vhead.sync.publications import made_folder, staging_folder


def export(
    directory: str | Path,
    to: str | Path,
    *,
    layout: Literal["slime"] = "slime",
    step: int | None = None,
    checksum: Literal["xxh3-128", "blake3"] = "xxh3-128",
    full: bool = False,
    staging: str | Path | None = None,
) -> int:
    """Writes a publication as the next version into a folder that other engines read.

    The layout is slime's: folders `weight_v000001`, `weight_v000002` and so on, which SGLang's `/pull_weights` brings
    into an engine. The first version is a whole checkpoint. The later ones hold the bytes that have changed since the
    one before, to be overwritten, and a checksum of each changed tensor. A version is whole as well where the one
    before was of a publication that is no longer in the directory, or of other tensors, and where a tensor has 4 GiB or
    more. Everything is verified before it is written, and a version has its name once it is on the disk.

    Args:
        directory: The publisher's directory.
        to: The folder of versions, which is made if need be.
        layout: Whose form it is.
        step: Which publication; None: what `LATEST` names. One that the last version is of is not written again.
        checksum: What readers verify changed tensors with.
        full: Whether the version is a whole checkpoint in any case.
        staging: A folder on a disk of this machine for copies without a name, each as long as the weights; None: the
            system's for temporary files.

    Returns:
        The version's number, which engines are asked to pull.

    Raises:
        ValueError: There is no such layout or checksum, or the publication is not of a whole model.
        PublicationError: The publication is damaged.
        PublisherConflictError: Somebody else writes to the folder at this moment.
        SyncError: The publication is not there, or a folder cannot be read or written.
    """
    if layout != "slime":
        raise ValueError(f"layout: expected 'slime', got {layout!r}")
    return _native.sync_export(Path(directory), made_folder(Path(to)), step, checksum, full, staging_folder(staging))
