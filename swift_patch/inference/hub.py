"""Adapters on a hub, by ids as ms-swift takes them. Imports ms-swift only to fetch one."""
import logging
import os
import re
import time
from typing import Any, Mapping

from ..errors import reason_of

logger = logging.getLogger(__name__)

# `owner/name`, or a folder in that as ms-swift has it: `owner/name:folder`.
_ID = re.compile(r'(\w[\w.-]*)/(\w[\w.-]*)(:.+)?')
# Seconds within which a hub that can be reached says that it does not have something. Those of the ModelScope hub try
# half a minute where it cannot be reached.
_PATIENCE = 5.


def is_hub_id(path: str, folder: str = '') -> bool:
    """Returns whether something is the id of an adapter on a hub. What is there as a path is none.

    Nor is what would be in a folder that is there: a path with a mistake in it is told as one, without a network.

    Args:
        path: A path or an id.
        folder: What paths are relative to.
    """
    match = _ID.fullmatch(path)
    return match is not None and not os.path.exists(os.path.join(folder, match[1]))


def name_of_id(hub_id: str) -> str:
    """Returns the last part of an id, as the name of the last folder is that of a path."""
    return re.split('[/:]', hub_id.rstrip('/'))[-1]


def why_no_id(path: str) -> str:
    """Returns why something that is not there is not looked for on a hub, to be put after that; mostly nothing."""
    match = _ID.fullmatch(path)
    if match is None or not os.path.exists(match[1]):
        return ''
    return f', nor is it looked for on a hub, as {match[1]!r} is here'


class Hub:
    """The hub that users chose.

    Args:
        swift_args: What they gave of ms-swift's arguments: `use_hf`, `hub_token`.
    """

    def __init__(self, swift_args: Mapping[str, Any]):
        self._options = {key: swift_args.get(key) for key in ('use_hf', 'hub_token')}
        self._is_out_of_reach = False

    def path_of(self, name: str, path: str) -> str:
        """Returns where an adapter is: its path, or where ms-swift has put what it fetched by an id.

        Raises:
            ValueError: it is not there, and cannot be fetched.
        """
        if not is_hub_id(path):
            why = why_no_id(path)
            if why and not os.path.exists(path):
                raise ValueError(f'adapter {name!r} ({path}): the path does not exist{why}.')
            return path
        from ..ms_swift import safe_snapshot_download

        # At once, for a hub that cannot be reached is tried for long.
        logger.warning(f'adapter {name!r}: the path {path} does not exist, so it is looked for on a hub.')
        options = dict(self._options)
        if self._is_out_of_reach:
            # What was fetched before can still be found. The others need not wait as the first one did.
            options['local_files_only'] = True
        start = time.monotonic()
        try:
            found: str = safe_snapshot_download(path, **options)
            return found
        except Exception as e:  # hubs and networks have errors of their own
            self._is_out_of_reach = self._is_out_of_reach or time.monotonic() - start > _PATIENCE
            raise ValueError(
                f'adapter {name!r} ({path}): the path does not exist, and nothing can be fetched from a hub '
                f'by it: {reason_of(e, 300)}') from e
