"""Where the model called by a name is, as far as can be seen without loading it. Imports no
torch."""

from __future__ import annotations

from pathlib import Path

from upweight.errors import ModelError, nearest


def placed(name: str) -> Path | None:
    """The folder or GGUF file of the model called `name`, None for what may be a hub id.

    Raises ModelError when it is none of these.
    """
    try:
        path = Path(name).expanduser()
        if path.suffix == ".gguf":
            if not path.is_file():
                raise ModelError(f"model: there is no file {name}.")
            return path
        if path.is_dir():
            if not any((path / f).is_file() for f in ("config.json", "adapter_config.json")):
                held = ", ".join(sorted(p.name for p in path.iterdir())[:6]) or "nothing"
                raise ModelError(
                    f"model: {name} is not a model folder: it has no config.json (it holds: {held})"
                    ". Give the folder that has the model's config.json and weights."
                )
            return path
        is_file = path.is_file()
    except (OSError, RuntimeError) as error:  # a name too long, no permission, ~ of nobody
        reason = getattr(error, "strerror", None) or str(error)
        raise ModelError(
            f"model: {name[:80]} cannot be looked up: {reason}. Give a model folder that can be "
            "read, a .gguf file or a hub id."
        ) from error
    if is_file:
        raise ModelError(f"model: {name} is a file; give a model folder, a .gguf file or a hub id.")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"model: there is no folder {name}.{beside(path)}")
    return None


def beside(path: Path) -> str:
    """' Did you mean X?' for the model there whose name is most like that of `path`."""
    try:
        there = [str(p) for p in path.parent.iterdir() if p.is_dir() or p.suffix == ".gguf"]
    except OSError:
        return ""
    return nearest(str(path), there)
