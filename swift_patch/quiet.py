"""Keep libraries from writing to a terminal that belongs to a command."""
import contextlib
import io
import logging
from typing import Iterator


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Keeps everything below an error that ms-swift and transformers log or print from the terminal.

    Stdout and stderr are redirected meanwhile, so what the caller itself prints through them is lost, too. Import the
    libraries before: a log handler keeps the stderr that it was made with.
    """
    from transformers.utils import logging as transformers_logging

    def keep_errors(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    # A filter and not a level: `logger.info_if` of ms-swift sets the level to INFO for itself. Warnings go too:
    # ms-swift warns of the code in a model directory at every load, and the directory here is our own.
    logger = logging.getLogger('swift')
    logger.addFilter(keep_errors)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        # The progress bars and the trainer's summary are printed, not logged.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        logger.removeFilter(keep_errors)


@contextlib.contextmanager
def without_info() -> Iterator[None]:
    """Keeps from the terminal what ms-swift logs below a warning, and what it warns of once more."""
    warned = set()

    def keep_new_warnings(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        is_kept = record.levelno >= logging.WARNING and message not in warned
        warned.add(message)
        return is_kept

    # A filter, for the same reason as above. ms-swift need not be imported yet.
    logger = logging.getLogger('swift')
    logger.addFilter(keep_new_warnings)
    try:
        yield
    finally:
        logger.removeFilter(keep_new_warnings)


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Keeps from the terminal the bars that transformers shows while it loads."""
    from transformers.utils import logging as transformers_logging
    was_shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_shown:
            transformers_logging.enable_progress_bar()
