"""What one run of `swift-patch infer` is, and what it did."""
from dataclasses import dataclass, field
from typing import Any, Dict, Literal, Mapping

# ms-swift's options that say what is asked and how it is answered, and so what the result lines are.
ANSWER_OPTIONS = ('template', 'system', 'max_length', 'truncation_strategy', 'response_prefix', 'enable_thinking',
                  'max_new_tokens', 'temperature', 'top_k', 'top_p', 'repetition_penalty', 'num_beams', 'stop_words',
                  'logprobs', 'top_logprobs', 'seed')


@dataclass
class InferConfig:
    """What one run is.

    Attributes:
        adapters: Where the checkpoint of each named adapter is: a path, or an id on a hub. Those that no sample names
            are not looked at.
        val_dataset: The JSONL with the samples.
        result_path: The JSONL to write, one line per sample.
        swift_args: Arguments of ms-swift's `BaseArguments` (`model`, `template`, `torch_dtype`, `max_new_tokens`,
            `temperature`, `seed`, ...). As in `swift infer`, what is not given comes from the args.json of the first
            adapter that has one, of those that samples name.
        merge_method: 'fusion', 'mixture' or 'selection'.
        composer_args: Further arguments of `FusionComposer` (`combination_type`, `density`, ...).
        max_batch_size: How many samples are answered together at most.
        compile_merging: Merge by a compiled kernel, see `swift_patch.compile_merging`.
        resume: Go on with an existing result file.
        overwrite: Start again, over an existing result file.
    """
    adapters: Mapping[str, str]
    val_dataset: str
    result_path: str
    swift_args: Dict[str, Any] = field(default_factory=dict)
    merge_method: Literal['fusion', 'mixture', 'selection'] = 'fusion'
    composer_args: Dict[str, Any] = field(default_factory=dict)
    max_batch_size: int = 16
    compile_merging: bool = False
    resume: bool = False
    overwrite: bool = False


@dataclass
class InferSummary:
    """What one run did.

    Attributes:
        samples: Samples generated now.
        resumed: Samples that were finished before.
        seconds_composing: Seconds spent on composing adapters.
        seconds_generating: Seconds spent in ms-swift's engine.
        seconds: Seconds of the whole loop, with writing.
    """
    samples: int = 0
    resumed: int = 0
    seconds_composing: float = 0.
    seconds_generating: float = 0.
    seconds: float = 0.

    @property
    def samples_per_second(self) -> float:
        """Samples generated now over the seconds of the loop, 0 where there were none."""
        return self.samples / self.seconds if self.samples else 0.
