"""What one run of `swift-patch infer` is, and what it did."""
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Callable, ContextManager, Dict, Iterator, Literal, Mapping, Optional, Sequence, Union

# ms-swift's options that say what is asked and how it is answered, and so what the result lines are.
ANSWER_OPTIONS = ('template', 'system', 'max_length', 'truncation_strategy', 'response_prefix', 'enable_thinking',
                  'max_new_tokens', 'temperature', 'top_k', 'top_p', 'repetition_penalty', 'num_beams', 'stop_words',
                  'logprobs', 'top_logprobs', 'seed')

# What shows the stages of a run: called with a description, how many things there are to do (None where that is not
# known) and how many of them are done already, for a context whose value is called with how many more are done.
Stage = Callable[..., ContextManager[Callable[[int], None]]]


@contextmanager
def no_stage(description: str, total: Optional[int] = None, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Shows nothing."""
    yield lambda count: None


@dataclass
class InferConfig:
    """What one run is.

    Attributes:
        adapters: Where the checkpoint of each named adapter is: a path, or an id on a hub. Those that no sample names
            are not looked at.
        val_dataset: The dataset with the samples, or several, as ms-swift takes them: a file, `FILE#N`, an id on a hub.
        result_path: The JSONL to write, one line per sample; by default where `swift infer` puts its own.
        swift_args: Arguments of ms-swift's `InferArguments` (`model`, `template`, `torch_dtype`, `max_new_tokens`,
            `temperature`, `seed`, `metric`, `stream`, ...). As in `swift infer`, what is not given comes from the
            args.json of the first adapter that has one, of those that samples name.
        default_adapters: The adapters of samples that name none, each with its weight, None for equal ones.
        merge_method: 'fusion', 'mixture' or 'selection'.
        composer_args: Further arguments of `FusionComposer` (`combination_type`, `density`, ...).
        max_batch_size: How many samples are answered together at most.
        compile_merging: Merge by a compiled kernel, see `swift_patch.compile_merging`.
        strict: Whether a sample that cannot be answered ends the run. Otherwise its line says why, and the run goes on.
        resume: Go on with an existing result file.
        retry_errors: With `resume`, try samples again whose lines say that they could not be answered.
        overwrite: Start again, over an existing result file.
    """
    adapters: Mapping[str, str]
    val_dataset: Union[str, Sequence[str]]
    result_path: Optional[str] = None
    swift_args: Dict[str, Any] = field(default_factory=dict)
    default_adapters: Mapping[str, Optional[float]] = field(default_factory=dict)
    merge_method: Literal['fusion', 'mixture', 'selection'] = 'fusion'
    composer_args: Dict[str, Any] = field(default_factory=dict)
    max_batch_size: int = 16
    compile_merging: bool = False
    strict: bool = True
    resume: bool = False
    retry_errors: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.val_dataset, str):
            self.val_dataset = [self.val_dataset]


@dataclass
class Answer:
    """What came of one sample.

    Attributes:
        response: The text.
        logprobs: The log probabilities of its tokens, where they were asked for.
        tokens: How many tokens were generated.
        error: Why there is no response, None where there is one.
    """
    response: Optional[str] = None
    logprobs: Any = None
    tokens: int = 0
    error: Optional[str] = None


@dataclass
class InferSummary:
    """What one run did.

    Attributes:
        result_path: The file with the results.
        samples: Samples that were tried now.
        resumed: Samples that were finished before.
        errors: Lines of the result file that say why there is no response, those of earlier runs too.
        tokens: Tokens generated now.
        seconds_composing: Seconds spent on composing adapters, of several processes their sum.
        seconds_generating: Seconds spent in ms-swift's engine, of several processes their sum.
        seconds: Seconds of the whole loop, with writing.
        metric: What `metric` asked for, by name, over all lines with both a response and a label.
    """
    result_path: str = ''
    samples: int = 0
    resumed: int = 0
    errors: int = 0
    tokens: int = 0
    seconds_composing: float = 0.
    seconds_generating: float = 0.
    seconds: float = 0.
    metric: Dict[str, float] = field(default_factory=dict)

    @property
    def samples_per_second(self) -> float:
        """Samples tried now over the seconds of the loop, 0 where there were none."""
        return self.samples / self.seconds if self.samples else 0.

    @property
    def tokens_per_second(self) -> float:
        """Tokens generated now over the seconds of the loop, 0 where there were none."""
        return self.tokens / self.seconds if self.tokens else 0.
