"""Every bad grid file says exactly what its first lines expect; each file is a way to go wrong."""

from pathlib import Path

import pytest

from mmsweep.grid import load_grid
from trainers.errors import InputError

FOLDER = Path(__file__).parent / "bad_grids"
MARK = "# expect: "


def identify(data):
    if data.path:
        raise InputError(f'no file matches "{data.path}"')
    return "sha256:" + "0" * 64


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_bad_grid(path):
    expected = [line.removeprefix(MARK) for line in path.read_text().splitlines() if line.startswith(MARK)]
    with pytest.raises(InputError) as caught:
        load_grid(path, identify=identify)
    assert str(caught.value).replace(f"{FOLDER}/", "").splitlines() == expected


def test_there_are_many():
    assert len(list(FOLDER.glob("*.yaml"))) >= 30
