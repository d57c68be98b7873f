"""Names → folders: a local path as it stands, or a Hugging Face name, fetched where there is a network."""

from __future__ import annotations

import re
from pathlib import Path

from posttrain.core import MissingExtraError, ModelError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.txt"]  # no code and no pickle is ever fetched
_ELSEWHERE = ["*/*"]  # other formats of the same weights


def resolve(name_or_path: Path | str) -> Path:
    """The local folder of a model.

    Args:
        name_or_path: a folder, or a name on the Hugging Face Hub ("Qwen/Qwen3-0.6B"), optionally "@revision" after it.

    Raises:
        ModelError: there is no such folder, and it cannot be fetched.
        MissingExtraError: it must be fetched, and `huggingface_hub` is not installed.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    name, _, revision = str(name_or_path).partition("@")
    if path.exists() or isinstance(name_or_path, Path) or not _NAME.fullmatch(name):
        raise ModelError(f"{name_or_path}: no such model folder")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError:
        raise MissingExtraError("huggingface_hub", "hub", f"{name!r} is no local folder, and fetching it") from None
    try:
        folder = snapshot_download(
            name, revision=revision or None, allow_patterns=_PATTERNS, ignore_patterns=_ELSEWHERE
        )
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise ModelError(
            f"{name_or_path}: no such folder here, and the Hugging Face Hub does not give it ({error}). "
            "Give the path of a local folder, or fetch it where there is a network: "
            f"hf download {name} --local-dir FOLDER"
        ) from error
    return Path(folder)
