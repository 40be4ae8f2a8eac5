from pathlib import Path

import pytest

from tests.reporting.caches import caches_of


@pytest.fixture(scope="session")
def caches(made: Path) -> dict[str, Path]:
    """Folder of each of VARIANTS. Not to be changed."""
    return caches_of(made)
