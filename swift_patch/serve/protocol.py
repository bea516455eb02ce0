"""The bodies of requests: ms-swift's, with the fields for a fusion and with what each field may be."""
from dataclasses import dataclass, field
from pydantic import Field, model_validator
from typing import Annotated, Any, ClassVar, Dict, List, Literal, Optional, Sequence, Union

from ..errors import short_repr
from .stock import ChatCompletionRequest, CompletionRequest

_Count = Annotated[Optional[int], Field(ge=1)]
_Penalty = Annotated[float, Field(ge=-2, le=2)]
_Texts = Annotated[List[Annotated[str, Field(min_length=1, max_length=1000)]], Field(max_length=16)]
# Below it, logits over a temperature are more than a float holds.
_MIN_TEMPERATURE = 1e-3
# What media are: nothing in a request is a path, and what ms-swift takes for base64 may be one.
_MEDIA = ('data:', 'http://', 'https://')


@dataclass
class LoraScale:
    """An adapter and its weight, in the form of llama.cpp's server."""
    name: str
    scale: Annotated[float, Field(allow_inf_nan=False)] = 1.


@dataclass
class FusionMixin:
    """The fields of a request that say what answers it, and what its other fields may be.

    Attributes:
        adapters: The adapters to merge, or a mapping to weights; none for the base model.
        weights: A weight for each; by default 1/k for each of k.
        merge_method: Average parameters (fusion), average outputs (mixture), or take the heaviest adapter alone.
        lora: The same in the form of llama.cpp's server: the outputs are added, each with its scale.
        max_completion_tokens: OpenAI's newer name of `max_tokens`.
    """
    adapters: Optional[Union[List[str], Dict[str, Annotated[float, Field(allow_inf_nan=False)]]]] = None
    weights: Optional[List[Annotated[float, Field(allow_inf_nan=False)]]] = None
    merge_method: Optional[Literal['fusion', 'mixture', 'selection']] = None
    lora: Optional[List[LoraScale]] = None
    max_completion_tokens: _Count = None

    max_tokens: _Count = None
    temperature: Annotated[Optional[float], Field(ge=0, le=2)] = None
    top_k: Annotated[Optional[int], Field(ge=-1, le=2**31 - 1)] = None
    top_p: Annotated[Optional[float], Field(ge=0, le=1)] = None
    min_p: Annotated[Optional[float], Field(ge=0, le=1)] = None
    repetition_penalty: Annotated[Optional[float], Field(ge=0.01, le=100)] = None
    num_beams: Annotated[int, Field(ge=1)] = 1
    stop: Union[str, _Texts, None] = field(default_factory=list)
    top_logprobs: Annotated[Optional[int], Field(ge=0)] = None
    n: Annotated[int, Field(ge=1)] = 1
    presence_penalty: _Penalty = 0.
    frequency_penalty: _Penalty = 0.
    length_penalty: Annotated[float, Field(ge=-10, le=10)] = 1.

    @model_validator(mode='before')
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        """Leaves out what is null, as clients of OpenAI's say that they say nothing."""
        if not isinstance(values, dict):
            return values
        return {key: value for key, value in values.items() if value is not None}

    def _settle(self) -> None:
        """Makes one way of saying a thing of several."""
        if isinstance(self.stop, str):
            self.stop = [self.stop]
        if self.max_tokens is None:
            self.max_tokens = self.max_completion_tokens
        if self.temperature is not None and self.temperature < _MIN_TEMPERATURE:
            self.temperature = 0.


@dataclass
class ChatRequest(FusionMixin, ChatCompletionRequest):  # type: ignore[misc]  # ms-swift has no types
    """The body of `/v1/chat/completions`.

    Attributes:
        call: What the server notes of the request. No field.
    """
    call: ClassVar[Any]

    def __post_init__(self) -> None:
        self._settle()
        if not self.messages:
            raise ValueError('messages is expected to have one message or more, found none.')
        # ms-swift would read the files.
        for message in self.messages:
            content = message.get('content')
            # So is that of a message that calls tools.
            if content is None and message.get('role') == 'assistant' and message.get('tool_calls'):
                message['content'] = content = ''
            for item in content if isinstance(content, list) else ():
                kind = item.get('type')
                if kind != 'text':
                    _check_media(item.get(kind) if isinstance(kind, str) else None)
        _check_media_of(self)
        try:
            super().__post_init__()
        except (AttributeError, IndexError, KeyError, TypeError) as e:
            raise ValueError(
                f'messages and tools are expected to be those of OpenAI, found something else ({e!r}).') from e

    def parse(self) -> Any:
        """Returns the request and the settings of ms-swift's engine, the first with what the server notes of it."""
        infer_request, request_config = super().parse()
        infer_request.call = self.__dict__['call']
        return infer_request, request_config


@dataclass
class TextRequest(FusionMixin, CompletionRequest):  # type: ignore[misc]  # ms-swift has no types
    """The body of `/v1/completions`."""
    prompt: Union[str, Annotated[List[str], Field(min_length=1, max_length=1)]]  # type: ignore[misc]  # is before
    # A number of OpenAI's.
    logprobs: Union[bool, int, None] = None

    def __post_init__(self) -> None:
        self._settle()
        if not isinstance(self.prompt, str):
            [self.prompt] = self.prompt
        if self.logprobs is not None and not isinstance(self.logprobs, bool):
            self.top_logprobs = self.logprobs
        self.logprobs = bool(self.logprobs)
        _check_media_of(self)
        super().__post_init__()


def _check_media_of(request: Any) -> None:
    """Raises ValueError where an image, a sound or a video beside the messages of a request is no URL."""
    for values in (request.images, request.audios, request.videos):
        _check_media(values)


def _check_media(value: Any) -> None:
    """Raises ValueError where an image, a sound or a video is no URL."""
    if isinstance(value, dict):
        value = value.get('url')
    values: Sequence[Any] = value if isinstance(value, list) else [value]
    for each in values:
        if not isinstance(each, str) or not each.strip().lower().startswith(_MEDIA):
            raise ValueError(f'Media are expected to be URLs that begin with one of {list(_MEDIA)}, found '
                             f'{short_repr(each)}.')
