from __future__ import annotations

import pytest
from synthetic import grid_index, modular_like, paper_like, write_store

from analysis.load import load


@pytest.fixture(scope="session")
def paper_store(tmp_path_factory):
    """The five arms of the paper, two seeds each. To be read only."""
    return write_store(tmp_path_factory.mktemp("paper"), paper_like())


@pytest.fixture(scope="session")
def paper_frames(paper_store):
    return load(paper_store)


@pytest.fixture(scope="session")
def modular_frames(tmp_path_factory):
    """The modular-manifolds grid, three seeds, every hypothesis supported. To be read only."""
    runs = modular_like(3)
    index = grid_index(runs, name="modular_manifolds")
    return load(write_store(tmp_path_factory.mktemp("modular"), runs, index=index))
