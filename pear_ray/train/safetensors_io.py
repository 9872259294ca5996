"""The weights in a Hugging Face folder, tensor by tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import safe_open


def open_tensors(folder: Path) -> dict[str, Any]:
    """The opened file of every tensor, by name; `files[name].get_tensor(name)` reads it. Files are
    mapped, not read."""
    files: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        file: Any = safe_open(str(path), framework="pt")
        files |= dict.fromkeys(file.keys(), file)
    return files
