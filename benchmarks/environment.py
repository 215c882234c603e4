"""TRL's own environment: benchmarks/.venv, made from benchmarks/requirements.txt when needed.

    python benchmarks/environment.py

makes it or brings it up to date; equal.py and compare.py do the same before they start.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
FOLDER = HERE / ".venv"
REQUIREMENTS = HERE / "requirements.txt"


def trl_python() -> Path:
    """The interpreter that has the pinned TRL; its environment is made first where it is not there.

    Raises subprocess.CalledProcessError when pip cannot install what is pinned.
    """
    python = FOLDER / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    stamp = FOLDER / "installed-requirements"
    wanted = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()
    if python.exists() and stamp.exists() and stamp.read_text() == wanted:
        return python
    print(f"installing {REQUIREMENTS.name} into {FOLDER}", file=sys.stderr)
    if not python.exists():
        venv.create(FOLDER, with_pip=True)
    command = [str(python), "-m", "pip", "install", "--quiet", "--requirement", str(REQUIREMENTS)]
    subprocess.run(command, check=True)
    stamp.write_text(wanted)
    return python


if __name__ == "__main__":
    print(trl_python())
