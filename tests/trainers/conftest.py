"""Which trainers this environment has: TRL 0.11 and TRL 1.12 cannot be installed beside each other."""

from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version


def _trl() -> Version | None:
    try:
        return Version(version("trl"))
    except PackageNotFoundError:
        return None


TRL = _trl()
HAS_OLD_PPO = TRL is not None and Version("0.12") > TRL
HAS_NEW_PPO = TRL is not None and Version("0.29") <= TRL < Version("1.13")

collect_ignore = [
    name
    for name, is_there in {"test_trl_0_11.py": HAS_OLD_PPO, "test_trl_1_12.py": HAS_NEW_PPO}.items()
    if not is_there
]
