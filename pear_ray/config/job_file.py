"""Job files: TOML that people write, JSON that a run folder keeps."""

from __future__ import annotations

import tomllib
from pathlib import Path

from pydantic import ValidationError

from pear_ray.config.errors import format_validation_error
from pear_ray.config.job import Job
from pear_ray.config.secrets import refuse_secrets
from pear_ray.errors import ConfigError


def read_job(path: Path) -> Job:
    """The job that a TOML file describes, or the JSON file of a resolved job.

    Raises:
        ConfigError: the file is missing, is not TOML, or says something a job cannot say, or
            holds what looks like a secret.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); expected a job file") from error
    try:
        if path.suffix == ".json":
            return Job.model_validate_json(text)
        document = tomllib.loads(text)
        refuse_secrets(str(path), document)
        return Job.model_validate(document)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: is not TOML: {error}") from error
    except ValidationError as error:
        raise ConfigError(format_validation_error(path, error, Job)) from error
