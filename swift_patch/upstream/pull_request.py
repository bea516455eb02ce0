"""The text of the pull request."""
import json
from pathlib import Path
from typing import Any, Dict, Optional

_FILES = Path(__file__).with_name('files')


def pull_request(figures: Optional[Path] = None) -> str:
    """Returns the text of the pull request, in Markdown.

    Args:
        figures: What `swift-patch bench --json` wrote; by default the figures that are shipped.

    Raises:
        ValueError: the file cannot be read, or is not of this kind.
    """
    path = figures or _FILES / 'figures.json'
    try:
        table = _table(json.loads(path.read_text(encoding='utf-8')))
    except (OSError, ValueError, KeyError, IndexError, TypeError) as e:
        raise ValueError(f'{path} is expected to be what `swift-patch bench --json` writes, but cannot be used: '
                         f'{type(e).__name__}: {e}') from e
    return (_FILES / 'pull_request.md').read_text(encoding='utf-8').replace('{figures}', table)


def _table(found: Dict[str, Any]) -> str:
    """Returns the seconds of some samples, before and after, with what they were measured on."""
    samples = found['samples'][:found['stock_samples']]
    shown = [number for number in (1, 2, 5, 10, 20, 30, 50, 100) if number <= len(samples)]
    versions = ', '.join(f'{name} {version}' for name, version in found['versions'].items())
    lines = [
        f'Seconds of composing a sample (`{found["settings"]["combination_type"]}`), {_about(found)}:', '',
        '| sample | ' + ' | '.join(map(str, shown)) + ' |', '| --- |' + ' ---: |' * len(shown)
    ]
    for title, key in (('before: a new adapter each', 'stock_seconds'), ('after: refilled', 'patch_seconds')):
        values = ' | '.join(f'{samples[number - 1][key]:.3g}' for number in shown)
        lines.append(f'| {title} | {values} |')
    return '\n'.join([*lines, '', f'({versions})'])


def _about(found: Dict[str, Any]) -> str:
    model, machine, per_sample = found['model'], found['machine'], found['settings']['adapters_per_sample']
    return (f'{per_sample} of {model["adapters"]} LoRAs in {model["lora_layers"]} LoRA layers, on '
            f'{machine["device_name"]} with {machine["cores"]} cores')
