"""The one exception that commands turn into a single line."""


class InputError(ValueError):
    """
    Something the user supplied (a file, a config key, an argument) cannot be used.

    The message says what was expected, what was found and what to do. Commands print it as one
    line without a traceback; libraries catch it as the `ValueError` it is.
    """
