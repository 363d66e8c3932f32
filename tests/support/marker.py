"""Leaves a file behind where it is called: what a hostile configuration would do."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


class Marker:
    def __init__(self, path: str = "", **_: Any) -> None:
        Path(path or os.environ["MARKER"]).touch()
