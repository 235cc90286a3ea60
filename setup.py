"""Where the rooms are in this copy: `pyproject.toml` says the rest.

Links stand for the rooms in `src/stca/`, which static tools follow in an editable install. A copy that lost its links
takes the rooms from the top instead.
"""

from pathlib import Path

from setuptools import setup

ROOMS = ("calibration", "examples", "export", "plugins", "runtime")

setup(package_dir={"": "src"} | {f"stca.{room}": room for room in ROOMS if not Path("src/stca", room).is_dir()})
