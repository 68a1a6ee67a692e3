"""What a command answers in one line."""


class ConfigError(ValueError):
    """A configuration that cannot be run; one line says which value, what was expected and what came."""
