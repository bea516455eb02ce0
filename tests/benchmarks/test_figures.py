"""The tables and the picture, from a JSON like pytest-benchmark's."""
from figures import draw, samples, tables
from pathlib import Path

CONTENT = {
    'machine_info': {
        'cpu': {
            'brand_raw': 'A CPU',
            'count': 2
        },
        'packages': {
            'torch': '2.13.0'
        }
    },
    'benchmarks': [{
        'stats': {
            'median': 0.012
        },
        'extra_info': {
            'subject': 'merge',
            'case': 'small',
            'what': 'an update',
            'divided_by': 'a copy',
            'ratio': 3.0,
            'bound': 2,
            'seconds': {
                'update': 0.012,
                'copy': 0.004
            }
        }
    }, {
        'stats': {
            'median': 0.2
        },
        'extra_info': {
            'subject': 'samples',
            'case': 'swift_patch',
            'samples': [0.1, 0.2, 0.3]
        }
    }]
}


def test_tables_name_the_machine_and_what_was_measured() -> None:
    assert tables(CONTENT) == '''On A CPU, 2 cores, with torch 2.13.0.

an update, over a copy:

| case | ms | merge | at most |
| --- | ---: | ---: | ---: |
| small | 12 / 4 | 3 | 2 |

| seconds of sample | 1 | 2 |
| --- | ---: | ---: |
| swift_patch | 0.1 | 0.2 |'''


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    draw(samples(CONTENT), tmp_path / 'cost.png')
    assert (tmp_path / 'cost.png').read_bytes().startswith(b'\x89PNG')
