"""A written model directory to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from losia_dist.errors import ConfigError


def check_repository(name: str) -> None:
    """Before training: whether the directory could go there. Nothing is sent.

    Raises:
        ConfigError: no name of a repository, or no token for the hub.
    """
    from huggingface_hub import get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(f"--push_to_hub {name}: give OWNER/NAME: {error}") from error
    if get_token() is None:
        raise ConfigError(f"--push_to_hub {name}: there is no token for the hub. Run `hf auth login`, or set HF_TOKEN.")


def push_model(directory: str | Path, name: str) -> str:
    """Upload a model directory, model card and all; returns its address. One process calls it. A new repository is private.

    Raises:
        ConfigError: the hub refuses, or cannot be reached; the directory stays as it is.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        hub = HfApi(library_name="losia_dist")
        address = hub.create_repo(name, private=True, exist_ok=True)
        hub.upload_folder(repo_id=name, folder_path=str(directory), commit_message="Model trained with losia_dist")
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        again = f"from huggingface_hub import HfApi; HfApi().upload_folder(repo_id={name!r}, folder_path={str(directory)!r})"
        raise ConfigError(
            f"--push_to_hub {name}: {type(error).__name__}: {error}. The model is in {directory}; to push it later: {again}"
        ) from error
    return str(address)
