"""A callback that tells its secrets wherever a program can tell something."""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import warnings
from typing import Any

from lightning.pytorch import Callback

PRINTED = "sha256 of the secrets: "


class Leaky(Callback):
    """Prints, logs and warns with its secrets, and fails with them if it is told to."""

    def __init__(
        self,
        password: str,
        api_key: str,
        options: dict[str, Any] | None = None,
        fails: bool = False,
    ) -> None:
        self.secrets = [password, *(options or {}).values(), os.environ["HF_TOKEN"]]
        self.secrets.insert(0, api_key)
        self.fails = fails

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        print(PRINTED + hashlib.sha256("\n".join(self.secrets).encode()).hexdigest(), flush=True)
        for secret in self.secrets:
            print(f"printed: {secret}")
            print(f"printed: {secret}", file=sys.stderr)
            logging.getLogger(__name__).warning("logged: %s", secret)
            warnings.warn(f"warned: {secret}", stacklevel=1)
        try:
            raise ValueError(" ".join(self.secrets))
        except ValueError as error:
            logging.getLogger(__name__).exception("a traceback of %s", error)
        if self.fails:
            raise RuntimeError("no service takes " + " ".join(self.secrets))
