"""The files that an input names: one, those of a folder or a pattern, or those of a data set on the hub."""

from fnmatch import fnmatchcase
from glob import glob, has_magic
from pathlib import Path
from typing import Any

from vhead.errors import FileFormatError, loading

HUB = "hf://"
_DATASETS = f"{HUB}datasets/"
_PARQUET = ".parquet"


def input_files(name: str) -> list[Path]:
    """The files of an input, in sorted order; those of a folder, a pattern or several of the hub's are Parquet.

    Args:
        name: A file, a folder, a pattern such as `data/train-*.parquet`, or one of them in a data set of the hub:
            `hf://datasets/OWNER/NAME/data/*.parquet`, with `@REVISION` behind NAME where one is meant. Files of the
            hub are downloaded into its cache.

    Raises:
        FileFormatError: A folder or a pattern has no Parquet files, or the name of a data set is of another form.
        OSError: There is no such file, or the hub cannot be reached.
    """
    if name.startswith(HUB):
        return _hub_files(name)
    path = Path(name)
    if path.is_dir():
        return _several(name, [str(file) for file in path.iterdir() if _counts(file.name)])
    if has_magic(name) and not path.exists():
        return _several(name, glob(name))
    path.stat()
    return [path]


def _several(name: str, found: list[str]) -> list[Path]:
    paths = [Path(file) for file in sorted(found) if file.lower().endswith(_PARQUET)]
    if not paths:
        raise FileFormatError(f"{name}: expected a folder or a pattern with {_PARQUET} files, got none")
    return paths


def _counts(name: str) -> bool:
    """Writers of many files leave notes and unfinished ones beside them, under such names."""
    return not name.startswith((".", "_"))


def _hub_files(name: str) -> list[Path]:
    owner, _, rest = name.removeprefix(_DATASETS).partition("/")
    repository, _, within = rest.partition("/")
    repository, _, revision = repository.partition("@")
    if not name.startswith(_DATASETS) or not (owner and repository and within):
        raise FileFormatError(f"{name}: expected {_DATASETS}OWNER/NAME/PATH, got another form")
    from huggingface_hub import HfApi, hf_hub_download  # only when used

    repo: dict[str, Any] = {"repo_id": f"{owner}/{repository}", "repo_type": "dataset", "revision": revision or None}
    with loading(name):
        files = [file for file in HfApi().list_repo_files(**repo) if _is_meant(file, within.rstrip("/"))]
        if within not in files:
            files = [str(path) for path in _several(name, files)]
        return [Path(hf_hub_download(filename=file, **repo)) for file in files]


def _is_meant(file: str, within: str) -> bool:
    folder, _, last = file.rpartition("/")
    return file == within or (folder == within and _counts(last)) or (has_magic(within) and _matches(file, within))


def _matches(file: str, pattern: str) -> bool:
    """As in a shell, `*` stops at a folder's end."""
    names, patterns = file.split("/"), pattern.split("/")
    return len(names) == len(patterns) and all(map(fnmatchcase, names, patterns))
