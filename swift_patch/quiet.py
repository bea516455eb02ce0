"""Keep libraries from writing to a terminal that belongs to a command."""
import contextlib
import io
import logging
import os
from typing import Callable, Iterator


@contextlib.contextmanager
def keeping(is_kept: Callable[[logging.LogRecord], bool]) -> Iterator[None]:
    """Within it, ms-swift logs nothing but what `is_kept`. It need not be imported yet."""
    # A filter and not a level: `logger.info_if` of ms-swift sets the level to INFO for itself.
    logger = logging.getLogger('swift')
    logger.addFilter(is_kept)
    try:
        yield
    finally:
        logger.removeFilter(is_kept)


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Keeps everything below an error that ms-swift and transformers log or print from the terminal.

    Stdout and stderr are redirected meanwhile, so what the caller itself prints through them is lost, too. Import the
    libraries before: a log handler keeps the stderr that it was made with.
    """
    from transformers.utils import logging as transformers_logging

    def keep_errors(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        # Warnings go too: ms-swift warns of the code in a model directory at every load, and the directory here is our
        # own. The progress bars and the trainer's summary are printed, not logged.
        with keeping(keep_errors), contextlib.redirect_stdout(io.StringIO()), \
                contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)


@contextlib.contextmanager
def without_info() -> Iterator[None]:
    """Keeps from the terminal what ms-swift and vLLM log below a warning, and what ms-swift warns of once more."""
    # vLLM reads it when it is imported, in each of its processes.
    os.environ.setdefault('VLLM_LOGGING_LEVEL', 'WARNING')
    warned = set()

    def keep_new_warnings(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        is_kept = record.levelno >= logging.WARNING and message not in warned
        warned.add(message)
        return is_kept

    with keeping(keep_new_warnings):
        yield


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
