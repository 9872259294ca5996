"""The error for mistakes of the user; importing it costs nothing."""


class ConfigError(ValueError):
    """A job, a file or a folder that the user named cannot be used. The message names the file and the field, then the
    expected and the actual value; the command line prints it without a traceback and exits with code 2."""


def require(holds: object, field: str, expected: str, got: object) -> None:
    """Raise ConfigError unless `holds`."""
    if not holds:
        raise ConfigError(f"{field}: expected {expected}, got {got}")
