"""Find class names that mean little to a text encoder, because they become prompts ("a photo of a n02687172")."""

import re
from collections import Counter
from collections.abc import Iterable

_NUMBERED = re.compile(r"(?:class|label|category|cls|id)?[ _-]*[\d .,_-]*\d", re.IGNORECASE)
_WORDNET_ID = re.compile(r"[nvars]\d{8}", re.IGNORECASE)


def without_words(names: Iterable[str]) -> list[str]:
    """Return the names that are WordNet ids (n02687172) or numbers (7, 007, class 7), in their order."""
    return [name for name in names if _WORDNET_ID.fullmatch(name.strip()) or _NUMBERED.fullmatch(name.strip())]


def differing_in_case(names: Iterable[str]) -> list[str]:
    """Return the names that differ from another name only in case, in their order."""
    names = list(names)
    same = Counter(name.casefold() for name in names)
    return [name for name in names if same[name.casefold()] > 1]
