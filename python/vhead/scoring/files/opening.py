"""Files of scores: which output a name means."""

from pathlib import Path

from vhead.rollouts.files.compressed import COMPRESSIONS
from vhead.rollouts.files.opening import STANDARD_STREAM, format_of
from vhead.rollouts.files.standard_streams import standard_output
from vhead.scoring.files.output import CompressedOutput, Output, OutputFile


def open_output(name: str, *, resume: bool = False, overwrite: bool = False, suffix: str = "") -> Output:
    """A file of scores, or standard output as JSON Lines when `name` is `-`.

    Args:
        name: A file name or `-`.
        resume: Whether to continue what an earlier run of the same settings and input left.
        overwrite: Whether to replace what earlier runs left.
        suffix: Added to the names of the scores' columns.

    Raises:
        FileFormatError: The suffix names no format.
        OutputError: Something is there under the output's name that may not be replaced, or another run writes it.
        OSError: The file cannot be created.
        MissingExtraError: pyarrow is needed and not installed.
    """
    suffix_of_name = format_of(name)
    if name == STANDARD_STREAM:
        return Output(standard_output(), suffix)
    if suffix_of_name == ".parquet":
        from vhead.scoring.files.parquet import ParquetOutput  # pyarrow only when used

        return ParquetOutput(Path(name), suffix, resume=resume, overwrite=overwrite)
    if Path(name).suffix.lower() in COMPRESSIONS:
        return CompressedOutput(Path(name), suffix, resume=resume, overwrite=overwrite)
    return OutputFile(Path(name), suffix, resume=resume, overwrite=overwrite)
