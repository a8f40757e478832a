"""Supplies the boundary of a stage to the window: from the cache where it can, through the prefix where it must.

Records at a depth are defined as: one straight run to the `origin` depth (the chain's start layer), one encoding
there, then one decode - layer - encode a further layer. So they are a pure function of sample, adapters and origin,
however often a site was away, and a run that lost its cache ends with the same bits. Two depths are kept: the origin,
which never goes stale because nothing below it is trained, and the one in use.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from chainfed_engine.boundary import BoundaryCache, cache_key, wipe
from chainfed_engine.cache_cipher import CacheCipher
from chainfed_engine.prefix import Prefix
from chainfed_engine.types import Batch


class BoundarySupply:
    """Boundary entering layer `depth` for the samples of one site. `adapters_hash(d)`: of the adapters below layer d.

    `model_key` stands for everything else the records depend on: store, activation mode, cache format.
    """

    def __init__(
        self,
        prefix: Prefix,
        directory: Path,
        *,
        depth: int,
        origin: int,
        model_key: str,
        adapters_hash: Callable[[int], str],
        cipher: CacheCipher | None = None,
    ) -> None:
        self._cipher = cipher
        self.prefix, self.directory, self.depth = prefix, directory, depth
        self.origin = min(max(origin, 1), max(depth, 1))
        self._model_key, self._adapters_hash = model_key, adapters_hash
        self._cache: BoundaryCache | None = None
        self._at_origin: BoundaryCache | None = None
        self._dirty = False

    def prepare(self, batches: Sequence[Batch]) -> int:
        """Bring the cache of all samples to `depth`; `batches` are the groups of a first fill. Returns layers run.

        Without batches, what the cache holds is brought to `depth`."""
        if self.depth == 0:
            return 0
        sample_ids = [sample_id for batch in batches for sample_id in batch.sample_ids]
        cache = self._deepest(sample_ids)
        layers_run = 0
        if cache is None:
            cache = self._create(self.origin)
            with _closed_on_error(cache):
                for batch, lengths, records in self.prefix.first_records(batches, range(self.origin)):
                    cache.append(batch.sample_ids, lengths, records)
                cache.seal()
            layers_run += self.origin
        while cache.depth < self.depth:
            advanced = self._advance(cache)
            if advanced is None:
                wipe(self.directory)
                return self.prepare(batches)
            cache, layers_run = advanced, layers_run + 1
        wipe(self.directory, keep={self.origin, self.depth})
        self._cache = cache
        return layers_run

    def get(self, batch: Batch) -> Tensor:
        """Boundary f32 [B, T, D] of the batch; samples the cache does not hold are computed and added."""
        if self.depth == 0:
            return self.prefix.model.embed(batch)
        if self._cache is None:
            self._cache = self._open(self.depth) or self._create(self.depth)
        found = self._cache.read(batch.sample_ids)
        if found is not None:
            return self.prefix.decode(found[0], batch)
        _, lengths, records = next(self.prefix.first_records([batch], range(self.origin)))
        if self.depth > self.origin:
            self._at_origin = self._at_origin or self._open(self.origin) or self._create(self.origin)
            self._at_origin.append(batch.sample_ids, lengths, records)
        for layer in range(self.origin, self.depth):
            records = self.prefix.next_records(records, lengths, layer)
        self._cache.append(batch.sample_ids, lengths, records)
        self._dirty = True
        return self.prefix.decode(records, batch)

    def close(self) -> None:
        """Seal what was added and close the files."""
        for cache in (self._cache, self._at_origin):
            if cache is not None:
                if self._dirty:
                    cache.seal()
                cache.close()
        self._cache = self._at_origin = None
        self._dirty = False

    def _deepest(self, sample_ids: Sequence[str]) -> BoundaryCache | None:
        for depth in range(self.depth, self.origin - 1, -1):
            cache = self._open(depth)
            if cache is not None:
                if all(sample_id in cache for sample_id in sample_ids):
                    return cache
                cache.close()
        return None

    def _advance(self, source: BoundaryCache) -> BoundaryCache | None:
        with _closed_on_error(source):
            target = self._create(source.depth + 1)
            with _closed_on_error(target):
                for group in source.iterate_groups():
                    if group is None:
                        source.close()
                        target.close()
                        return None
                    sample_ids, records, lengths = group
                    target.append(sample_ids, lengths, self.prefix.next_records(records, lengths, source.depth))
                target.seal()
        source.close()
        return target

    def _open(self, depth: int) -> BoundaryCache | None:
        return BoundaryCache.open(
            self.directory,
            depth,
            self._key(depth),
            cache_format=self.prefix.cache_format,
            hidden_size=self._hidden_size,
            cipher=self._cipher,
        )

    def _create(self, depth: int) -> BoundaryCache:
        return BoundaryCache.create(
            self.directory,
            depth,
            self._key(depth),
            cache_format=self.prefix.cache_format,
            hidden_size=self._hidden_size,
            cipher=self._cipher,
        )

    @property
    def _hidden_size(self) -> int:
        return self.prefix.model.shape.hidden_size

    def _key(self, depth: int) -> str:
        return cache_key(
            self._model_key, self.prefix.cache_format, str(self.origin), str(depth), self._adapters_hash(depth)
        )


@contextmanager
def _closed_on_error(cache: BoundaryCache) -> Iterator[None]:
    """A file that stays open keeps its space on a full disk even once it is removed."""
    try:
        yield
    except BaseException:
        cache.close()
        raise
