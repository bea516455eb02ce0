"""The releases of ms-swift and PEFT that this package works with. pyproject.toml says the same.

Nothing here imports either.
"""
import sys
from importlib import metadata
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion
from typing import Dict, Optional

SUPPORTED: Dict[str, SpecifierSet] = {'ms-swift': SpecifierSet('>=3.11.2,<4.7'), 'peft': SpecifierSet('>=0.18,<0.21')}
_MODULES = {'ms-swift': 'swift'}


def installed(package: str) -> Optional[str]:
    """Returns the version of a package, or None where it is not installed.

    What is imported counts before what is installed: a checkout on `sys.path` has no metadata, or that of an older one.
    """
    version = getattr(sys.modules.get(_MODULES.get(package, package)), '__version__', None)
    if isinstance(version, str):
        return version
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def is_supported(package: str) -> bool:
    """Whether what is installed of a package is supported. What is not installed needs no support."""
    found = installed(package)
    try:
        # A pre-release counts as what it is before: there is no telling what a branch has.
        return found is None or SUPPORTED[package].contains(found, prereleases=True)
    except InvalidVersion:
        return False


def unsupported() -> Optional[str]:
    """Returns what is installed that is not supported, and what to do, in one text for users; None where all is."""
    wrong = [package for package in SUPPORTED if not is_supported(package)]
    if not wrong:
        return None
    found = ' and '.join(f'{package} {installed(package)}' for package in wrong)
    wanted = ' '.join(f'"{package}{specifier}"' for package, specifier in SUPPORTED.items())
    return (f'swift_patch does not support {found}, which is installed here, and patches nothing: ms-swift and PEFT '
            f'work as they do without it. Install a supported release (pip install {wanted}), or set '
            'SWIFT_PATCH_DISABLE=1 to be told no more.')
