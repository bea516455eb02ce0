"""Adapters that come and go while a server runs, in the form of vLLM's routes."""
import asyncio
from dataclasses import dataclass
from fastapi import FastAPI
from pathlib import Path
from starlette.responses import PlainTextResponse
from typing import Sequence

from ..compose.composer import FusionComposer
from ..errors import short_repr
from ..lora.library import AdapterLibrary
from .errors import RequestError


@dataclass
class LoadRequest:
    """The body of `/v1/load_lora_adapter`."""
    lora_name: str
    lora_path: str
    load_inplace: bool = False


@dataclass
class UnloadRequest:
    """The body of `/v1/unload_lora_adapter`."""
    lora_name: str


class RuntimeAdapters:
    """The routes by which adapters come and go.

    Args:
        library: The adapters.
        composer: What merges them.
        base: The name of the base model, which no adapter can have.
        folders: Where adapters may be.
    """

    def __init__(self, library: AdapterLibrary, composer: FusionComposer, base: str, folders: Sequence[str]):
        self._library, self._composer, self._base = library, composer, base
        self._folders = [Path(folder).resolve() for folder in folders]
        self._lock = asyncio.Lock()

    def register(self, app: FastAPI) -> None:
        """Adds the routes to an application."""
        app.post('/v1/load_lora_adapter')(self.load)
        app.post('/v1/unload_lora_adapter')(self.unload)

    async def load(self, request: LoadRequest) -> PlainTextResponse:
        """Adds an adapter, or replaces it where `load_inplace` says so."""
        name, path = request.lora_name, self._allowed(request.lora_path)
        if name in ('', self._base, self._composer.adapter_name):
            raise RequestError(
                400,
                f'A name that nothing else has is expected, found {short_repr(name)}: give another one.',
                param='lora_name')
        async with self._lock:
            if name in self._library and not request.load_inplace:
                raise RequestError(
                    400,
                    f'Adapter {short_repr(name)} exists: unload it first, or give load_inplace.',
                    param='lora_name')
            try:
                # Before a request can name it. Not in this thread: it waits for the batch that is being answered.
                await asyncio.to_thread(self._composer.check_checkpoint, name, path)
                self._library.put(name, path)
            except (OSError, ValueError) as e:
                raise RequestError(400, str(e).replace(str(path), request.lora_path), param='lora_path') from e
        return PlainTextResponse(f'Success: LoRA adapter {name!r} added successfully.')

    async def unload(self, request: UnloadRequest) -> PlainTextResponse:
        """Removes an adapter. Its files stay."""
        async with self._lock:
            if request.lora_name not in self._library:
                raise RequestError(
                    404,
                    f'Adapter {short_repr(request.lora_name)} does not exist.',
                    param='lora_name',
                    code='model_not_found')
            self._library.remove(request.lora_name)
        return PlainTextResponse(f'Success: LoRA adapter {request.lora_name!r} removed successfully.')

    def _allowed(self, text: str) -> Path:
        """Returns where a path leads, links followed. Raises RequestError where that is below none of the folders."""
        try:
            path = Path(text).resolve()
            is_allowed = any(path.is_relative_to(folder) for folder in self._folders)
        except (OSError, RuntimeError, ValueError):  # a name that is too long, links in a circle, a zero byte
            is_allowed = False
        if not is_allowed:
            raise RequestError(
                400, f'A path below one of the folders that this server takes adapters from is expected, found '
                f'{short_repr(text)}.',
                param='lora_path')
        return path
