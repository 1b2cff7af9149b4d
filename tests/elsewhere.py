"""What processes of the tests' server do that shall have imported little. So this module imports little."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from predict_train import cli


def inspect_from_a_notebook(folder: Path, figure: Path, told: Path) -> None:
    """`inspect`, where what a notebook sets is there, and a terminal that knows ASCII only."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        del sys.modules[name]  # it asks for the environment when it is imported, so it is imported again
    os.environ |= {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "LC_ALL": "C"}
    sys.stdout = sys.stderr = told.open("w", encoding="ascii")
    sys.argv = ["predict-train", "inspect", str(folder), "--plot", str(figure)]
    cli.main()
