"""A release's packs for Ray Train: ``ray.train.get_dataset_shard`` hands each worker its rank's loader."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray.train

from lake import Release
from train.loader import Loader, LoaderConfig, open_loader
from train.statistics import Statistics
from train.turns import Cursor, lanes_of_rank


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A rank's share of a stream of packs, to be opened where it is used."""

    release: Release
    config: LoaderConfig
    rank: int
    world_size: int
    statistics: Statistics | None = None

    def open(self, cursor: Cursor | None = None) -> Loader:
        """Return the loader; arguments and errors as in ``open_loader``.

        Args:
            cursor: from the checkpoint that ``ray.train.get_checkpoint()`` gives; None means at the start.
        """
        return open_loader(self.release, self.config, self.rank, self.world_size, cursor, self.statistics)


class LakeDataConfig(ray.train.DataConfig):
    """Shares streams of packs out to workers, anew at every start, restart and resize.

    Pass it as ``dataset_config`` of a trainer, with its ``datasets()`` as ``datasets``.
    """

    def __init__(
        self, release: Release, configs: Mapping[str, LoaderConfig], statistics: Statistics | None = None
    ) -> None:
        """Keep what workers need.

        Args:
            configs: of each stream, by the name that ``get_dataset_shard`` is to be asked for: train, validation.
            statistics: None takes those of the release.
        """
        super().__init__(datasets_to_split=[])
        self._release = release
        self._configs = dict(configs)
        self._statistics = statistics

    def datasets(self) -> dict[str, Any]:
        """Return what a trainer takes as ``datasets``: the streams' names, since it hands out what it has names of."""
        return dict.fromkeys(self._configs, _nothing)

    def configure(
        self, datasets: Any, world_size: int, worker_handles: Any, worker_node_ids: Any, **_: Any
    ) -> list[dict[str, Shard]]:
        """Return what each worker gets; Ray calls it whenever workers start.

        Raises:
            ValueError: more workers than lanes, or a dataset that is none of the streams.
        """
        del worker_handles, worker_node_ids
        unknown = [name for name in datasets if name not in self._configs]
        if unknown:
            raise ValueError(
                f"no stream is called {', '.join(unknown)}; there are {', '.join(self._configs)}. Give a trainer "
                "datasets=config.datasets()"
            )
        for config in self._configs.values():
            lanes_of_rank(0, world_size, config.order.lanes)
        return [
            {
                name: Shard(
                    release=self._release,
                    config=config,
                    rank=rank,
                    world_size=world_size,
                    statistics=self._statistics,
                )
                for name, config in self._configs.items()
            }
            for rank in range(world_size)
        ]


def _nothing() -> None:
    """Stand for a dataset: Ray calls it at every start."""
