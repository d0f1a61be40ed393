"""Near-duplicates of a prompt in another split, which a hash of the prompt cannot see.

MinHash (Broder 1997) over runs of five words finds candidates, the exact Jaccard similarity decides. Prompts
of one template share most of their words and count as near-duplicates too: whether that is a leak is for the
reader to say.
"""

import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from pars_fast.data import LengthFile, Split
from pars_fast.text import normalised

SHINGLE_WORDS = 5
PERMUTATIONS = 128
BANDS = 32  # of 4 rows: a pair of similarity 0.8 is met with probability 1 - (1 - 0.8^4)^32 > 0.9999
MIN_SIMILARITY = 0.8
MAX_BUCKET = 200  # a template of more prompts than this is looked at in its first ones alone
MERSENNE_PRIME = (1 << 61) - 1


@dataclass(frozen=True, slots=True)
class Occurrence:
    file: str
    split: Split
    prompt: str


@dataclass(frozen=True, slots=True)
class NearDuplicate:
    """Two prompts of different splits; `similarity` is the Jaccard index of their shingles, in [0.8, 1]."""

    first: Occurrence
    second: Occurrence
    similarity: float


def near_duplicates(files: Sequence[LengthFile]) -> list[NearDuplicate]:
    """Pairs of prompts in different splits, of the same file or of two, most similar first."""
    occurrences = [Occurrence(file.name, row.split, row.prompt) for file in files for row in file.rows]
    shingles = [_shingles(occurrence.prompt) for occurrence in occurrences]
    buckets: dict[tuple[int, bytes], list[int]] = defaultdict(list)
    for index, signature in enumerate(_signatures(shingles)):
        for band, values in enumerate(signature.reshape(BANDS, -1)):
            buckets[band, values.tobytes()].append(index)
    candidates = {
        pair
        for members in buckets.values()
        for pair in combinations(members[:MAX_BUCKET], 2)
        if occurrences[pair[0]].split != occurrences[pair[1]].split
    }
    found = [
        NearDuplicate(occurrences[i], occurrences[j], similarity)
        for i, j in candidates
        if (similarity := _jaccard(shingles[i], shingles[j])) >= MIN_SIMILARITY
    ]
    return sorted(found, key=lambda pair: (-pair.similarity, pair.first.prompt, pair.second.prompt))


def leaking_prompts(pairs: Sequence[NearDuplicate], split: Split) -> Counter[str]:
    """How many distinct prompts of `split` in each file have a near-duplicate in train."""
    leaks = set()
    for pair in pairs:
        for one, other in ((pair.first, pair.second), (pair.second, pair.first)):
            if one.split == split and other.split == "train":
                leaks.add((one.file, one.prompt))
    return Counter(file for file, _ in leaks)


def _shingles(prompt: str) -> frozenset[int]:
    """Hashes of all runs of five words; of the whole prompt if it has fewer."""
    words = normalised(prompt).split()
    runs = range(max(1, len(words) - SHINGLE_WORDS + 1))
    return frozenset(zlib.crc32(" ".join(words[i : i + SHINGLE_WORDS]).encode()) for i in runs)


def _signatures(shingles: Sequence[frozenset[int]]) -> Iterator[NDArray[np.uint64]]:
    """(PERMUTATIONS,) smallest hash of each prompt's shingles under random linear maps."""
    rng = np.random.default_rng(0)
    factor = rng.integers(1, 1 << 29, PERMUTATIONS, dtype=np.uint64)[:, None]  # times 32 bits: no overflow
    offset = rng.integers(0, 1 << 60, PERMUTATIONS, dtype=np.uint64)[:, None]
    for prompt in shingles:
        values = np.fromiter(prompt, dtype=np.uint64, count=len(prompt))
        yield ((factor * values + offset) % np.uint64(MERSENNE_PRIME)).min(axis=1)


def _jaccard(first: frozenset[int], second: frozenset[int]) -> float:
    return len(first & second) / len(first | second)
