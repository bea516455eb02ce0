"""What is used of ms-swift's server, under its names in ms-swift 4, whichever release is installed.

Importing this module imports ms-swift, FastAPI and uvicorn.
"""
from importlib.util import find_spec
from swift.utils import JsonlWriter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or find_spec('swift.infer_engine') is not None:
    from swift.arguments import BaseArguments, DeployArguments
    from swift.infer_engine.protocol import ChatCompletionRequest, CompletionRequest
    from swift.pipelines.infer.deploy import SwiftDeploy
    from swift.pipelines.infer.infer import SwiftInfer
    from swift.template import MaxLengthError
else:  # ms-swift 3
    from swift.llm import BaseArguments, DeployArguments, MaxLengthError
    from swift.llm.infer.deploy import SwiftDeploy
    from swift.llm.infer.infer import SwiftInfer
    from swift.llm.infer.protocol import ChatCompletionRequest, CompletionRequest

__all__ = [
    'ChatCompletionRequest', 'CompletionRequest', 'JsonlWriter', 'MaxLengthError', 'ServerArguments', 'SwiftDeploy',
    'SwiftInfer'
]


class _Key(str):
    """A text that is not shown where something that has it is."""

    def __repr__(self) -> str:
        return '...'


class ServerArguments(DeployArguments):  # type: ignore[misc]  # ms-swift has no types
    """ms-swift's arguments of a server whose adapters are not ms-swift's to load.

    What it is given as `adapters` are paths alone, of which it reads the args.json: a path may contain `=`.
    """

    api_key: Any

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.api_key is not None:
            # ms-swift logs its arguments.
            self.api_key = _Key(self.api_key)

    def _init_adapters(self) -> None:
        self.adapter_mapping: dict[str, str] = {}
        BaseArguments._init_adapters(self)
